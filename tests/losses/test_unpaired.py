"""Batches whose images and captions only partly belong together, compared with numpy in float64."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import numpy as np
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

from clip_rd_edge.losses.bank import Bank
from clip_rd_edge.losses.objective import PAIR_TERMS, EmbeddingBatch, Objective, Weights

ROWS, WIDTH = 6, 5
PAIRED = [True, False, True, True, False, False]
TEACHER_SCALE = 12.0
TERMS = tuple(Weights.__struct_fields__)


def make_batch(paired: list[bool] | None) -> EmbeddingBatch:
    student = [rows(ROWS, WIDTH, seed).requires_grad_() for seed in (0, 1)]
    teacher = [rows(ROWS, WIDTH, seed) for seed in (2, 3)]
    mask = None if paired is None else torch.tensor(paired)
    return EmbeddingBatch(*student, *teacher, Bank(rows(9, WIDTH, 4), rows(7, WIDTH, 5)), mask)


def make_objective(*terms: str) -> Objective:
    return in_float64(Objective(Weights(**dict.fromkeys(terms, 1.0)), scales="raw"))


def evaluate(batch: EmbeddingBatch, *terms: str, block: slice | None = None) -> Tensor:
    scale = torch.tensor(STUDENT_SCALE, dtype=torch.float64)
    total: Tensor = make_objective(*terms)(batch, scale, TEACHER_SCALE, block=block).total
    return total


def expected(batch: EmbeddingBatch, term: str, s_v: Array, s_t: Array) -> Any:
    """The definition of a term: of the pairs alone if it compares an image with its own caption, else of all rows."""
    assert batch.teacher_image is not None
    assert batch.teacher_text is not None
    assert batch.paired is not None
    assert batch.bank is not None
    t_v, t_t = batch.teacher_image.numpy(), batch.teacher_text.numpy()
    if term in ("task", "icl", "vrd_kl", "xrd"):
        kept = batch.paired.numpy()
        s_v, s_t, t_v, t_t = s_v[kept], s_t[kept], t_v[kept], t_t[kept]
    student, teacher = STUDENT_SCALE * s_v @ s_t.T, TEACHER_SCALE * t_v @ t_t.T
    if term == "task":
        return both_ways(cross_entropy, student)
    if term == "fd":
        return np.mean((s_v - t_v) ** 2) + np.mean((s_t - t_t) ** 2)
    if term == "icl":
        return (cross_entropy(CROSS_SCALE * s_v @ t_t.T) + cross_entropy(CROSS_SCALE * s_t @ t_v.T)) / 2
    if term == "hrd":
        return both_ways(divergence, teacher, student)
    if term == "affinity":
        return both_ways(divergence, teacher, student) + both_ways(entropy, teacher)
    if term == "vrd_kl":
        return both_ways(divergence, TEXT_SCALE * t_t @ s_t.T, IMAGE_SCALE * t_v @ s_v.T)
    if term == "vrd_ce_image":
        logits = IMAGE_SCALE * t_v @ s_v.T
        return both_ways(cross_entropy, logits)
    if term == "vrd_ce_text":
        logits = TEXT_SCALE * t_t @ s_t.T
        return both_ways(cross_entropy, logits)
    if term == "xrd":
        a, b = CROSS_SCALE * t_v @ s_t.T, CROSS_SCALE * t_t @ s_v.T
        return (both_ways(divergence, b, a) + both_ways(divergence, a, b)) / 2
    sides = itertools.product(((s_v, t_v), (s_t, t_t)), (batch.bank.image.numpy(), batch.bank.text.numpy()))
    return sum(divergence(TEACHER_SCALE * t @ bank.T, TEACHER_SCALE * s @ bank.T) for (s, t), bank in sides) / 4


@pytest.mark.parametrize("term", TERMS)
def test_loss_and_gradients_match_numpy(term: str) -> None:
    batch = make_batch(PAIRED)
    assert_matches(evaluate(batch, term), batch, partial(expected, batch, term))


@pytest.mark.parametrize("term", TERMS)
def test_a_batch_of_pairs_alone_has_the_loss_of_one_without_a_mask(term: str) -> None:
    assert torch.equal(evaluate(make_batch([True] * ROWS), term), evaluate(make_batch(None), term))


@pytest.mark.parametrize("boundaries", [(0, 1, 6), (0, 2, 4, 6), (0, 4, 6)])  # the last block of the last is unpaired
def test_blocks_add_up_to_the_whole(boundaries: tuple[int, ...]) -> None:
    whole, parts = make_batch(PAIRED), make_batch(PAIRED)
    loss = evaluate(whole, *TERMS)
    loss.backward()
    blocks = [evaluate(parts, *TERMS, block=slice(*pair)) for pair in itertools.pairwise(boundaries)]
    torch.autograd.backward(blocks)
    torch.testing.assert_close(sum(blocks), loss, rtol=0, atol=1e-9)
    for side in ("student_image", "student_text"):
        torch.testing.assert_close(getattr(parts, side).grad, getattr(whole, side).grad, rtol=0, atol=1e-9)


def test_without_a_pair_the_terms_of_pairs_are_zero_and_leave_no_trace() -> None:
    alone, with_pair_terms = make_batch([False] * ROWS), make_batch([False] * ROWS)
    others = [term for term in TERMS if term not in PAIR_TERMS]
    expected_loss, loss = evaluate(alone, *others), evaluate(with_pair_terms, *TERMS)
    expected_loss.backward()
    loss.backward()
    assert loss.item() == expected_loss.item() > 0
    for side in ("student_image", "student_text"):
        torch.testing.assert_close(getattr(with_pair_terms, side).grad, getattr(alone, side).grad, rtol=0, atol=0)


def test_a_batch_without_pairs_is_no_obstacle_for_an_objective_of_pairs() -> None:
    batch = make_batch([False] * ROWS)
    loss = evaluate(batch, "task")
    loss.backward()
    assert loss.item() == 0
    assert batch.student_image.grad is not None
    assert not batch.student_image.grad.any()


def test_an_objective_knows_whether_it_needs_pairs() -> None:
    assert Weights(task=1, xrd=1).needs_pairs
    assert not Weights(task=1, hrd=1).needs_pairs
