"""The training objective: a weighted sum of terms, those of CLIP, CLIP-KD, TinyCLIP, CLIP-RD, or others.

CLIP uses only the task term; CLIP-KD adds FD, ICL and HRD; CLIP-RD adds VRD and XRD to these.

In a batch of images and captions that only partly belong together, the terms that need pairs are those of the B' ≤ B
pairs in it: their means are over B', and the others' are over B. HRD and affinity compare each image with each caption,
and so need no pairs; FD, the contrastive parts of VRD and the bank look at images and captions apart. DIME-FM (Sun et
al. 2023) distils from such data in the same way: by the scores of images and texts that are no pairs, and by relations
within each.

For a whole batch, the B×B products are kept for the backward pass. In blocks of pairs, the rows and columns of each
block are computed separately and then freed: twice the products, but memory grows with B instead of B².
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from clip_rd_edge.errors import ConfigError
from clip_rd_edge.losses import shipped  # noqa: F401  it registers its terms
from clip_rd_edge.losses.terms import (
    PUBLISHED_START,
    EmbeddingBatch,
    Need,
    Products,
    ScaleKind,
    Scales,
    TeacherScale,
    find_term,
    place_of,
)
from clip_rd_edge.utils.structs import CheckedError


class Weights(dict[str, float]):
    """The weights of the terms, by name and in the order in which they are summed; a weight of 0 leaves a term out."""

    def __init__(self, weights: Mapping[str, float] = MappingProxyType({}), /, **named: float) -> None:
        given = {**weights, **named}
        for name, weight in given.items():
            find_term(name)
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise CheckedError(f"{name} is {weight!r}; expected a number")
            if not (math.isfinite(weight) and weight >= 0):
                raise CheckedError(f"{name} is {weight}; expected a finite number of at least 0")
        super().__init__((name, float(given[name])) for name in sorted(given, key=place_of) if given[name])

    def needing(self, *needs: Need) -> list[str]:
        """Return the names of the terms that need any of these."""
        return [name for name in self if find_term(name).needs & set(needs)]

    @property
    def needs_teacher(self) -> bool:
        """Whether any term uses the teacher's embeddings."""
        return bool(self.needing("teacher"))

    @property
    def needs_pairs(self) -> bool:
        """Whether nothing is left of the objective without pairs."""
        return len(self.needing("pairs")) == len(self)

    def for_texts(self) -> Weights:
        """Return the weights without terms that need images."""
        without = self.needing("images", "pairs")
        return Weights({name: weight for name, weight in self.items() if name not in without})


@dataclass(frozen=True)
class LossTerms:
    """The loss and its terms.

    Attributes:
        total: the weighted sum, a scalar that requires a gradient.
        terms: the unweighted value of each computed term, a scalar.
    """

    total: Tensor
    terms: dict[str, Tensor]


class Objective(nn.Module):
    """The weighted sum of terms.

    Its parameters are the scales a, b and c, and projections if the embedding sizes of student and teacher differ. The
    trainer optimises and saves them, but the student is evaluated and exported without them.

    Args:
        weights: weights of the terms.
        scales, scale_start: see `losses.terms.Scales`.
        widths: embedding sizes of the student and of each teacher, None without a teacher. If the student's is not
            that of the teachers side by side, terms that compare the two use learned linear projections of the
            student's image and text embeddings.
        bank_temperature: τ of the `bank` term.
    """

    def __init__(
        self,
        weights: Weights,
        *,
        scales: ScaleKind = "bounded",
        scale_start: float = PUBLISHED_START,
        widths: tuple[int, ...] | None = None,
        bank_temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if not weights:
            raise ConfigError("All weights of the objective are 0; expected at least one term, such as task: 1.")
        self.weights, self.bank_temperature = weights, bank_temperature
        self.scales = Scales(scales, start=scale_start)
        student, *self.teacher_widths = widths or (0,)
        total = sum(self.teacher_widths)
        differ = widths is not None and student != total
        self.image_projection = nn.Linear(student, total, bias=False) if differ else nn.Identity()
        self.text_projection = nn.Linear(student, total, bias=False) if differ else nn.Identity()

    @property
    def has_projections(self) -> bool:
        """Whether the embedding sizes of student and teachers differ."""
        return not isinstance(self.text_projection, nn.Identity)

    def forward(
        self,
        batch: EmbeddingBatch,
        student_scale: Tensor,
        teacher_scale: TeacherScale,
        *,
        block: slice | None = None,
        student_bias: Tensor | None = None,
    ) -> LossTerms:
        """Return the loss of a global batch, or the contribution of a block of its pairs.

        Args:
            batch: embeddings of the global batch.
            student_scale: γ_s, the student's logit scale as a multiplier, a scalar.
            teacher_scale: γ_t, the teacher's logit scale, or those of several teachers.
            student_bias: β_s, a scalar, of a student that has a bias.
            block: pairs `start` to `stop`; the losses of blocks that partition the batch add up to that of the batch.
        """
        whole = pairs = Products(batch, self, student_scale, teacher_scale, block, student_bias)
        if batch.paired is not None:
            within = block and slice(*(int(batch.paired[:end].sum()) for end in (block.start, block.stop)))
            pairs = Products(batch.only_pairs(), self, student_scale, teacher_scale, within, student_bias)
        terms = {}
        for name in self.weights:
            term = find_term(name)
            products = pairs if "pairs" in term.needs else whole
            # Of a batch without pairs: 0, with a graph.
            terms[name] = term.compute(products) if products.pairs else products.s_v.sum() + products.s_t.sum()
        total = torch.stack([weight * terms[name] for name, weight in self.weights.items()]).sum()
        return LossTerms(total=total, terms=terms)
