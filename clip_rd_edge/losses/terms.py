"""The loss terms that there are, and what a term can use: its `Products`.

A term is a function that is registered by its name, under which recipes give it a weight:

    @term("margin", needs={"pairs", "images"})
    def margin(p: Products) -> Tensor:
        return (p.student().rows.logsumexp(1) - p.student().diagonal).clamp_min(1).sum() / p.pairs

B is the batch size, and embeddings are L2-normalised, (B, D) each:

s_v, s_t         image and text embeddings of the student
t_v, t_t         image and text embeddings of the teacher
X·Y              the B×B product X Yᵀ
γ_s, γ_t         logit scales of the student and the teacher
β_s              logit bias of the student
a, b, c          learned scales: image, text, cross
CE(L)            −(1/B) Σ_i log softmax(L_i)_i: cross-entropy of the rows of L, with the matching pair as the target
KL(T ‖ L)        (1/B) Σ_i Σ_j P_ij (log P_ij − log Q_ij), P and Q the row-wise softmax of T and L; no gradient to T
sg               stops the gradient

The products, each of which is computed only if it is needed, and once for all terms:

    product          definition    used by
    student          s_v·s_t       task, HRD, affinity, sigmoid
    teachers         t_v·t_t       HRD, affinity (target)
    image_to_text    t_v·s_t       ICL (transposed), XRD
    text_to_image    t_t·s_v       ICL (transposed), XRD
    image_to_image   t_v·s_v       VRD
    text_to_text     t_t·s_t       VRD
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from clip_rd_edge.errors import InputError, near_matches
from clip_rd_edge.utils.paths import Typed
from clip_rd_edge.utils.structs import CheckedError

if TYPE_CHECKING:
    from clip_rd_edge.losses.objective import Objective

ENTRY_POINTS = "clip_rd_edge.terms"
Need = Literal["teacher", "pairs", "images", "bank"]
TeacherScale = float | Tensor | tuple[float, ...]
SHIPPED = ("task", "fd", "icl", "hrd", "affinity", "vrd_kl", "vrd_ce_image", "vrd_ce_text", "xrd", "bank", "sigmoid")


class Term(NamedTuple):
    """A registered term; see `term`."""

    name: str
    compute: Callable[[Products], Tensor]
    needs: frozenset[Need]
    matches: bool


_TERMS = dict[str, Term]()


def term(
    name: str, *, needs: Collection[Need], matches: bool = False
) -> Callable[[Callable[[Products], Tensor]], Callable[[Products], Tensor]]:
    """Register a function as a loss term.

    It returns a scalar: the share of the batch's term that is due to the pairs of `Products.rows`, so that the terms of
    blocks add up to that of the whole.

    Args:
        needs: `teacher` for the teacher's embeddings; `pairs` for a term that compares an image with its own caption,
            which is then that of the B' ≤ B rows that are pairs; `images` for one that has no part for texts alone;
            `bank` for the bank of the teacher's embeddings.
        matches: whether it compares the student's own images and texts, of whatever row. The other terms compare each
            with the teacher's: where the sizes differ, through a projection each, which does not keep them together.
    """

    def register(compute: Callable[[Products], Tensor]) -> Callable[[Products], Tensor]:
        if name in SHIPPED and not compute.__module__.startswith("clip_rd_edge.losses."):
            raise InputError(f"The loss term {name!r} is one of the package's; expected another name.", option="terms")
        _TERMS[name] = Term(name, compute, frozenset(needs), matches)
        return compute

    return register


def find_term(name: str) -> Term:
    """Return a registered term, or one that an installed package names as an entry point of ENTRY_POINTS."""
    if name not in _TERMS:
        for entry in entry_points(group=ENTRY_POINTS, name=name):
            entry.load()
    if name not in _TERMS:
        near = near_matches(str(name), _TERMS)
        raise CheckedError(f"unknown loss term {name!r}; the terms are {', '.join(term_names())}.{near}".rstrip("."))
    return _TERMS[name]


def term_names() -> list[str]:
    """Return the names of the registered terms, in the order in which they are summed: this package's first."""
    return sorted(_TERMS, key=place_of)


def place_of(name: str) -> tuple[int, str]:
    """Return the key that sorts a term among others, known or not."""
    return SHIPPED.index(name) if name in SHIPPED else len(SHIPPED), name


def load_terms(source: Typed) -> None:
    """Register the terms of a Python file, or of a module that can be imported; this runs what is in it."""
    try:
        if not source.endswith(".py"):
            importlib.import_module(source)
        elif (spec := spec_from_file_location(f"terms_of_{Path(source).stem}", source)) and spec.loader:
            sys.modules[spec.name] = module = module_from_spec(spec)
            spec.loader.exec_module(module)
    except (ImportError, OSError, SyntaxError) as error:
        raise InputError(f"The module {source} cannot be loaded: {error}.", option="terms") from error


def own_terms(names: Iterable[str]) -> list[str]:
    """Return those of some terms that are not shipped with this package."""
    return [name for name in names if name not in SHIPPED]


def source_of(name: str) -> str:
    """Return a SHA-256 of the file that defines a term, or of the function alone where there is none."""
    compute = find_term(name).compute
    file = inspect.getsourcefile(compute)
    content = Path(file).read_bytes() if file and Path(file).is_file() else inspect.getsource(compute).encode()
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class Bank:
    """The teacher's embeddings of K images and of K' captions, (K, D) and (K', D), L2-normalised."""

    image: Tensor
    text: Tensor


@dataclass(frozen=True)
class EmbeddingBatch:
    """L2-normalised embeddings of the global batch, (B, D) each; the teacher's are None if there is no teacher.

    Those of several teachers are side by side, see `losses.terms`.

    Attributes:
        bank: what the `bank` term compares with; None without this term.
        paired: which rows are an image and its own caption, (B,) bool; None if all are.
    """

    student_image: Tensor
    student_text: Tensor
    teacher_image: Tensor | None = None
    teacher_text: Tensor | None = None
    bank: Bank | None = None
    paired: Tensor | None = None

    def only_pairs(self) -> EmbeddingBatch:
        """Return the B' rows that are pairs, without the bank if there are others."""
        if self.paired is None:
            return self
        rows = self.paired.nonzero()[:, 0]
        return EmbeddingBatch(
            self.student_image[rows],
            self.student_text[rows],
            None if self.teacher_image is None else self.teacher_image[rows],
            None if self.teacher_text is None else self.teacher_text[rows],
        )


class Products:
    """What the terms of a batch are computed from, at least in float32; each product on first use.

    Attributes:
        s_v, s_t: the student's embeddings, (B, D_s).
        p_v, p_t: the same for terms that compare student and teacher: projected if the sizes differ.
        t_v, t_t: the teacher's embeddings, (B, D); there are none without a teacher.
        pairs: B.
        rows: the pairs whose share of the term is asked for: all of them or a block.
        student_scale, teacher_scales: γ_s, and γ_t of each teacher.
        student_bias: β_s; None for a student without one.
        bank: see `EmbeddingBatch`.
    """

    def __init__(
        self,
        batch: EmbeddingBatch,
        objective: Objective,
        student_scale: Tensor,
        teacher_scale: TeacherScale,
        block: slice | None,
        student_bias: Tensor | None = None,
    ) -> None:
        self.s_v, self.s_t = at_least_float32(batch.student_image), at_least_float32(batch.student_text)
        self.p_v, self.p_t = self.s_v, self.s_t
        if batch.teacher_image is not None and batch.teacher_text is not None:
            self.t_v, self.t_t = at_least_float32(batch.teacher_image), at_least_float32(batch.teacher_text)
            self.p_v = _projected(objective.image_projection, self.s_v)
            self.p_t = _projected(objective.text_projection, self.s_t)
        self.student_bias = student_bias
        self.student_scale, self.bank, self.bank_temperature = student_scale, batch.bank, objective.bank_temperature
        self.teacher_scales = teacher_scale if isinstance(teacher_scale, tuple) else (teacher_scale,)
        self.pairs, self.rows = len(self.s_v), block or slice(None)
        self._scales, self._widths, self._block = objective.scales, objective.teacher_widths, block
        self._computed = dict[str, Logits]()

    def parts(self, embeddings: Tensor) -> list[Tensor]:
        """Return the part of embeddings (B, D) that stands for each teacher; see `losses.terms`."""
        return teacher_parts(embeddings, self._widths)

    def student(self) -> Logits:
        """γ_s s_v·s_t."""
        return self._logits("student", self.student_scale, self.s_v, self.s_t)

    def teachers(self) -> list[Logits]:
        """γ_t t_v·t_t, of each teacher."""
        each = zip(self.teacher_scales, self.parts(self.t_v), self.parts(self.t_t), strict=True)
        return [self._logits(f"teacher {k}", *factors) for k, factors in enumerate(each)]

    def image_to_text(self) -> Logits:
        """c t_v·s_t."""
        return self._logits("image_to_text", self._scale("cross"), self.t_v, self.p_t)

    def text_to_image(self) -> Logits:
        """c t_t·s_v."""
        return self._logits("text_to_image", self._scale("cross"), self.t_t, self.p_v)

    def image_to_image(self) -> Logits:
        """a t_v·s_v."""
        return self._logits("image_to_image", self._scale("image"), self.t_v, self.p_v)

    def text_to_text(self) -> Logits:
        """b t_t·s_t."""
        return self._logits("text_to_text", self._scale("text"), self.t_t, self.p_t)

    def _scale(self, name: str) -> Tensor:
        return self._scales.multiplier(self._scales.get_parameter(name))

    def _logits(self, name: str, scale: float | Tensor, left: Tensor, right: Tensor) -> Logits:
        if name not in self._computed:
            # Under autocast, the products would be in half precision, where close logits become equal.
            with torch.autocast(self.s_v.device.type, enabled=False):
                self._computed[name] = compute_logits(scale * left, right, self._block)
        return self._computed[name]


def mean(terms: Iterable[Tensor]) -> Tensor:
    """Return the mean of scalars, such as one per teacher; a single one is returned unchanged."""
    terms = list(terms)
    return terms[0] if len(terms) == 1 else torch.stack(terms).mean()


def _projected(projection: nn.Module, embeddings: Tensor) -> Tensor:
    if isinstance(projection, nn.Identity):
        return embeddings
    with torch.autocast(embeddings.device.type, enabled=False):
        return nn.functional.normalize(projection(embeddings), dim=-1)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return embeddings in float32, or as they are in float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@dataclass(frozen=True)
class Logits:
    """The rows and columns of the B×B logits L that belong to the pairs `start` to `start + b`: all B pairs or a block.

    Every term is a mean over pairs of a function of the pair's row and column, so the terms of blocks add up to that of
    the whole. With blocks, a process computes only its own pairs, and L never has to fit in memory.

    Quantities that several terms share are cached: a pass over B×B entries costs as much as a narrow matrix product.

    Attributes:
        rows: L[start:start + b], (b, B).
        columns: Lᵀ[start:start + b], (b, B).
        diagonal: the logits of matching pairs, (b,), computed separately: the gradient of a diagonal of L would be a
            B×B matrix of mostly zeros.
        is_whole: whether b = B, so that `columns` is the transpose of `rows`.
    """

    rows: Tensor
    columns: Tensor
    diagonal: Tensor
    is_whole: bool

    @property
    def pairs(self) -> int:
        """B, the batch size."""
        return self.rows.shape[1]

    @cached_property
    def row_logsumexp(self) -> Tensor:
        """log Σ_j exp L_ij, (b,)."""
        with torch.enable_grad():  # cached: the first caller may not need a gradient, a later one may
            return torch.logsumexp(self.rows, dim=1)

    @cached_property
    def column_logsumexp(self) -> Tensor:
        """log Σ_j exp Lᵀ_ij, (b,)."""
        with torch.enable_grad():
            return torch.logsumexp(self.columns, dim=1)

    @torch.no_grad()
    def row_distribution(self) -> Tensor:
        """Return the softmax of each row, (b, B), detached."""
        return (self.rows - self.row_logsumexp[:, None]).exp_()

    @torch.no_grad()
    def column_distribution(self) -> Tensor:
        """Return the softmax of each column as a row, (b, B), detached."""
        return (self.columns - self.column_logsumexp[:, None]).exp_()


def compute_logits(left: Tensor, right: Tensor, block: slice | None) -> Logits:
    """Return the logits left @ rightᵀ, whole or for a block of pairs.

    Args:
        left, right: (B, D); one of them is already multiplied by the scale, to save a pass over the B×B product.
        block: pairs `start` to `stop`, or None for all.
    """
    if block is None:
        matrix = left @ right.T
        return Logits(matrix, matrix.T, (left * right).sum(dim=1), is_whole=True)
    diagonal = (left[block] * right[block]).sum(dim=1)
    return Logits(left[block] @ right.T, right[block] @ left.T, diagonal, is_whole=False)


@dataclass(frozen=True)
class Ensemble:
    """How the embeddings of K teachers, one or more, become those of one teacher.

    Teacher k of K has unit embeddings t^k, (B, D_k), and a logit scale γ_k. Side by side, they are unit embeddings of
    width D = Σ_k D_k, whose cosines are the means of the teachers' cosines:

        t = (t^1, …, t^K) / √K,    t_v·t_t = 1/K Σ_k t_v^k·t_t^k

    MobileCLIP (Vasu et al. 2024) stores the embeddings of its two teachers side by side, too. A student with embeddings
    of width D learns one teacher in each part of them; of another width, it has learned projections to D. The terms:

        hrd, affinity    the mean over teachers, 1/K Σ_k HRD(γ_k t_v^k·t_t^k ‖ γ_s s_v·s_t): MobileCLIP's distillation
                         loss. Its gradient is that of the divergence from the mean of the teachers' distributions, so
                         the teachers are averaged after the softmax, each at its own scale. Its minimum is their
                         Jensen-Shannon divergence: 0 where they agree.
        fd, bank         the mean over teachers of the term with the embeddings t^k, the scale γ_k, and part k of the
                         student's embeddings (of the projected ones) times √K: 0 for a student with the embeddings t.
                         FD is a mean over entries, and those of t are smaller the more teachers stand side by side:
                         compared with t as a whole, it would weigh K times less than for one teacher
        icl, vrd, xrd    as for one teacher with the embeddings t

    Teachers that share a text tower, as those tuned from one model with it frozen do, and those stitched to one
    sentence encoder, need no parts: with t_t^k = t_t for all k, the mean of their similarities is that to the mean of
    their image embeddings,

        1/K Σ_k γ t_v^k·t_t = γ (1/K Σ_k t_v^k)·t_t

    so they are one teacher of width D_1, whose image embeddings are the means, L2-normalised, at the mean of their
    scales.

    Attributes:
        teacher_widths: D_k of each teacher.
        scales: γ_k, the logit scale of each, a multiplier.
        share_text: they have one text tower, and with it one width.
    """

    teacher_widths: tuple[int, ...]
    scales: tuple[float, ...]
    share_text: bool = False

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each part of the joint embeddings: D_k for teacher k, or D_1 for all that share a text tower."""
        return self.teacher_widths[:1] if self.share_text else self.teacher_widths

    @property
    def logit_scale(self) -> float | tuple[float, ...]:
        """The logit scale of each part; a number if there is one part."""
        if self.share_text:
            return math.fsum(self.scales) / len(self.scales)
        return self.scales if len(self.scales) > 1 else self.scales[0]

    def join(self, embeddings: Sequence[Tensor]) -> Tensor:
        """Return t, (B, Σ_k D_k) or (B, D_1), L2-normalised, of the teachers' embeddings t^k, (B, D_k) each."""
        return normalize(torch.stack(list(embeddings)).sum(0), dim=1) if self.share_text else side_by_side(embeddings)


def side_by_side(embeddings: Sequence[Tensor]) -> Tensor:
    """Return t, (B, Σ_k D_k), L2-normalised, of the teachers' embeddings t^k, (B, D_k) each, L2-normalised."""
    if len(embeddings) == 1:
        return embeddings[0]
    return torch.cat(list(embeddings), dim=1) / math.sqrt(len(embeddings))


def teacher_parts(embeddings: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Return the parts of embeddings (B, Σ_k D_k) that stand for each teacher, times √K, (B, D_k) each.

    Args:
        widths: D_1 to D_K; of no or of one teacher, the embeddings are returned as they are.
    """
    if len(widths) <= 1:
        return [embeddings]
    return [part * math.sqrt(len(widths)) for part in torch.split(embeddings, list(widths), dim=1)]
