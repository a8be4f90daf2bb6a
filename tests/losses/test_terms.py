"""Every registered term: its formula in numpy, for one teacher, two, and rows that are no pairs; blocks; own terms."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from losses_in_numpy import (
    CROSS_SCALE,
    IMAGE_SCALE,
    STUDENT_SCALE,
    TEXT_SCALE,
    Array,
    assert_matches,
    both_ways,
    cross_entropy,
    divergence,
    entropy,
    in_float64,
    rows,
)
from torch import Tensor

from clip_rd_edge.errors import ConfigError, InputError
from clip_rd_edge.losses import terms
from clip_rd_edge.losses.objective import Objective, Weights
from clip_rd_edge.losses.terms import Bank, EmbeddingBatch, find_term, load_terms, side_by_side, term_names
from clip_rd_edge.utils.paths import typed

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_term.py"
TERMS = term_names()
ROWS, TEMPERATURE, BIAS = 6, 2.0, torch.tensor(-3.0, dtype=torch.float64)
PAIRED = (True, False, True, True, False, False)


class Case:
    """A batch: of a teacher, of several, or of rows that are not all pairs."""

    def __init__(self, *widths: int, scales: tuple[float, ...], paired: tuple[bool, ...] | None = None) -> None:
        self.widths, self.scales, self.paired = widths, scales, paired
        self.images, self.texts, self.bank_images, self.bank_texts = (
            [rows(count, width, seed + 10 * k) for k, width in enumerate(widths)]
            for seed, count in ((2, ROWS), (3, ROWS), (4, 9), (5, 7))
        )

    def batch(self) -> EmbeddingBatch:
        student = [rows(ROWS, sum(self.widths), seed).requires_grad_() for seed in (0, 1)]
        teacher = side_by_side(self.images).clone(), side_by_side(self.texts).clone()
        bank = Bank(side_by_side(self.bank_images), side_by_side(self.bank_texts))
        return EmbeddingBatch(*student, *teacher, bank, None if self.paired is None else torch.tensor(self.paired))

    def loss(self, batch: EmbeddingBatch, *names: str, block: slice | None = None) -> Tensor:
        weights = Weights(dict.fromkeys(names, 1.0))
        width = sum(self.widths)
        objective = Objective(weights, scales="raw", widths=(width, *self.widths), bank_temperature=TEMPERATURE)
        scale = torch.tensor(STUDENT_SCALE, dtype=torch.float64)
        scales = self.scales if len(self.scales) > 1 else self.scales[0]
        total: Tensor = in_float64(objective)(batch, scale, scales, block=block, student_bias=BIAS).total
        return total

    def expected(self, term: str, s_v: Array, s_t: Array) -> Any:
        """The definition, worked out from the embeddings of the single teachers."""
        count = len(self.widths)
        images, texts = ([part.numpy() for part in side] for side in (self.images, self.texts))
        if "pairs" in find_term(term).needs and self.paired is not None:
            kept = np.asarray(self.paired)
            s_v, s_t, images, texts = s_v[kept], s_t[kept], [v[kept] for v in images], [t[kept] for t in texts]
        t_v, t_t = (np.concatenate(parts, axis=1) / np.sqrt(count) for parts in (images, texts))
        student = STUDENT_SCALE * s_v @ s_t.T
        targets = [scale * image @ text.T for scale, image, text in zip(self.scales, images, texts, strict=True)]
        a, b = CROSS_SCALE * t_v @ s_t.T, CROSS_SCALE * t_t @ s_v.T
        image_to_image, text_to_text = IMAGE_SCALE * t_v @ s_v.T, TEXT_SCALE * t_t @ s_t.T
        if term in ("fd", "bank"):
            splits = np.cumsum(self.widths)[:-1]
            sides = [[np.sqrt(count) * part for part in np.split(side, splits, axis=1)] for side in (s_v, s_t)]
            if term == "fd":
                return (
                    sum(((s - t) ** 2).mean() for s, t in zip(sides[0] + sides[1], images + texts, strict=True)) / count
                )
            banks = [[part.numpy() for part in side] for side in (self.bank_images, self.bank_texts)]
            total: Any = 0.0
            for (own, teacher), bank in itertools.product(zip(sides, (images, texts), strict=True), banks):
                for k, scale in enumerate(self.scales):
                    gamma = scale / TEMPERATURE
                    total += divergence(gamma * teacher[k] @ bank[k].T, gamma * own[k] @ bank[k].T)
            return total / (4 * count)
        return {
            "task": lambda: both_ways(cross_entropy, student),
            "sigmoid": lambda: (
                np.log1p(np.exp((1 - 2 * np.eye(len(student))) * (student + BIAS.item()))).sum() / len(student)
            ),
            "icl": lambda: (cross_entropy(b.T) + cross_entropy(a.T)) / 2,
            "hrd": lambda: sum(both_ways(divergence, target, student) for target in targets) / count,
            "affinity": lambda: (
                sum(both_ways(divergence, target, student) + both_ways(entropy, target) for target in targets) / count
            ),
            "vrd_kl": lambda: both_ways(divergence, text_to_text, image_to_image),
            "vrd_ce_image": lambda: both_ways(cross_entropy, image_to_image),
            "vrd_ce_text": lambda: both_ways(cross_entropy, text_to_text),
            "xrd": lambda: (both_ways(divergence, b, a) + both_ways(divergence, a, b)) / 2,
        }[term]()


CASES = {
    "one teacher": Case(5, scales=(12.0,)),
    "two teachers": Case(4, 3, scales=(12.0, 30.0)),
    "not all are pairs": Case(5, scales=(12.0,), paired=PAIRED),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_term = pytest.mark.parametrize("term", TERMS)


@each_case
@each_term
def test_a_term_and_its_gradient_match_numpy(case: Case, term: str) -> None:
    batch = case.batch()
    assert_matches(case.loss(batch, term), batch, partial(case.expected, term))


@each_case
@pytest.mark.parametrize("boundaries", [(0, 1, 6), (0, 4, 6)])  # of the last, no row is a pair
def test_blocks_add_up_to_the_whole(case: Case, boundaries: tuple[int, ...]) -> None:
    whole, parts = case.batch(), case.batch()
    loss = case.loss(whole, *TERMS)
    loss.backward()
    blocks = [case.loss(parts, *TERMS, block=slice(*ends)) for ends in itertools.pairwise(boundaries)]
    torch.autograd.backward(blocks)
    torch.testing.assert_close(sum(blocks), loss, rtol=0, atol=1e-9)
    for side in ("student_image", "student_text"):
        torch.testing.assert_close(getattr(parts, side).grad, getattr(whole, side).grad, rtol=0, atol=1e-9)


@pytest.mark.parametrize("term", ["hrd", "affinity", "bank"])
def test_no_gradient_reaches_the_teacher_as_a_target(term: str) -> None:
    batch = CASES["one teacher"].batch()
    assert batch.teacher_image is not None
    batch.teacher_image.requires_grad_()
    CASES["one teacher"].loss(batch, term).backward()
    assert batch.teacher_image.grad is None
    assert batch.student_image.grad is not None


def test_without_a_pair_the_terms_of_pairs_are_zero_and_leave_no_trace() -> None:
    case = Case(5, scales=(12.0,), paired=(False,) * ROWS)
    alone, with_pair_terms = case.batch(), case.batch()
    others = [name for name in TERMS if "pairs" not in find_term(name).needs]
    assert {*TERMS} - {*others} == {"task", "icl", "vrd_kl", "xrd", "sigmoid"}
    expected, loss = case.loss(alone, *others), case.loss(with_pair_terms, *TERMS)
    torch.autograd.backward([expected, loss])
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    for side in ("student_image", "student_text"):
        torch.testing.assert_close(getattr(with_pair_terms, side).grad, getattr(alone, side).grad, rtol=0, atol=0)
    batch = case.batch()
    case.loss(batch, "task").backward()
    assert batch.student_image.grad is not None
    assert not batch.student_image.grad.any()


def test_the_sigmoid_is_open_clips_over_all_processes_and_trains_the_bias() -> None:
    """Each of three processes computes the rows of its own images."""
    image, text = (rows(ROWS, 5, seed).requires_grad_() for seed in (0, 1))
    scale, bias = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (STUDENT_SCALE, -3.0))
    expected = open_clip.loss.SigLipLoss()(image, text, scale, bias)
    inputs = [image, text, scale, bias]
    gradients = torch.autograd.grad(expected, inputs)
    objective = in_float64(Objective(Weights(sigmoid=1)))
    parts = [
        objective(EmbeddingBatch(image, text), scale, 1.0, block=slice(k, k + 2), student_bias=bias).total
        for k in (0, 2, 4)
    ]
    torch.testing.assert_close(sum(parts), expected, rtol=0, atol=1e-9)
    for own, theirs in zip(torch.autograd.grad(sum(parts), inputs), gradients, strict=True):
        torch.testing.assert_close(own, theirs, rtol=0, atol=1e-9)
    assert gradients[3].abs() > 1e-3


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The terms, which are as before afterwards."""
    own = dict(terms._TERMS)
    monkeypatch.setattr(terms, "_TERMS", own)
    return own


def test_an_own_term_is_summed_after_the_shipped_ones(registered: dict[str, Any]) -> None:
    load_terms(typed(EXAMPLE))
    case = CASES["not all are pairs"]
    assert list(Weights(margin=0.5, xrd=1, task=2)) == ["task", "xrd", "margin"]
    whole, parts = (case.loss(case.batch(), "margin", block=block) for block in (None, slice(0, ROWS)))
    torch.testing.assert_close(whole, parts)
    batch = case.batch()
    kept = torch.tensor(PAIRED)
    cosines = (batch.student_image[kept] @ batch.student_text[kept].T).detach()
    excess = (cosines - cosines.diagonal()[:, None] + 0.2).clamp(min=0)
    assert whole.item() == pytest.approx((excess.sum() - excess.diagonal().sum()).item() / 3)


def test_an_installed_package_brings_terms(registered: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        def load(self) -> None:
            load_terms(typed(EXAMPLE))

    asked = list[dict[str, str]]()
    monkeypatch.setattr(terms, "entry_points", lambda **names: asked.append(names) or [Entry()])
    assert Weights(margin=1) == {"margin": 1.0}
    assert asked == [{"group": "clip_rd_edge.terms", "name": "margin"}]


@pytest.mark.parametrize(
    "content",
    ["import absent", "def (", "from clip_rd_edge.losses.terms import term\n@term('task', needs=())\ndef f(p): ..."],
)
def test_what_cannot_be_loaded_is_refused(registered: dict[str, Any], tmp_path: Path, content: str) -> None:
    (tmp_path / "mine.py").write_text(content)
    with pytest.raises(InputError):
        load_terms(typed(tmp_path / "mine.py"))
    for absent in (tmp_path / "absent.py", "no_such_module"):
        with pytest.raises(InputError):
            load_terms(typed(absent))


def test_weights_are_those_of_known_terms() -> None:
    assert Weights(task=1, xrd=0) == {"task": 1.0}
    assert Weights(task=1, xrd=1).needs_pairs
    assert not Weights(task=1, hrd=1).needs_pairs
    assert Weights(task=1, fd=1, bank=1).for_texts() == {"fd": 1.0}
    for wrong in ({"xdr": 1}, {"task": -1}, {"task": float("nan")}, {"task": True}, {"task": "1"}):
        with pytest.raises(ConfigError):
            Weights(wrong)  # type: ignore[arg-type]
