"""Several teachers, each with a scale and a width of its own, compared with numpy in float64."""

from __future__ import annotations

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
from clip_rd_edge.losses.ensemble import Ensemble, side_by_side, teacher_parts
from clip_rd_edge.losses.objective import EmbeddingBatch, Objective, Weights

ROWS, WIDTHS, SCALES = 5, (4, 3), (12.0, 30.0)
TEMPERATURE = 2.0
TERMS = tuple(Weights.__struct_fields__)


def each_teacher(count: int, seed: int) -> list[Tensor]:
    return [rows(count, width, seed + 10 * k) for k, width in enumerate(WIDTHS)]


TEACHER_IMAGES, TEACHER_TEXTS = each_teacher(ROWS, 2), each_teacher(ROWS, 3)
BANK_IMAGES, BANK_TEXTS = each_teacher(9, 4), each_teacher(7, 5)


def make_batch() -> EmbeddingBatch:
    student = [rows(ROWS, sum(WIDTHS), seed).requires_grad_() for seed in (0, 1)]
    bank = Bank(side_by_side(BANK_IMAGES), side_by_side(BANK_TEXTS))
    return EmbeddingBatch(*student, side_by_side(TEACHER_IMAGES), side_by_side(TEACHER_TEXTS), bank)


def make_objective(*terms: str, student_width: int = sum(WIDTHS)) -> Objective:
    widths = (student_width, *WIDTHS)
    weights = Weights(**dict.fromkeys(terms, 1.0))
    return in_float64(Objective(weights, scales="raw", widths=widths, bank_temperature=TEMPERATURE))


def evaluate(batch: EmbeddingBatch, *terms: str, block: slice | None = None) -> Tensor:
    scale = torch.tensor(STUDENT_SCALE, dtype=torch.float64)
    total: Tensor = make_objective(*terms)(batch, scale, SCALES, block=block).total
    return total


def expected(term: str, s_v: Array, s_t: Array) -> Any:
    """The definition of `losses.ensemble`, worked out from the embeddings of the single teachers."""
    count = len(WIDTHS)
    images, texts = [t.numpy() for t in TEACHER_IMAGES], [t.numpy() for t in TEACHER_TEXTS]
    if term in ("task", "hrd", "affinity"):
        logits = STUDENT_SCALE * s_v @ s_t.T
        if term == "task":
            return both_ways(cross_entropy, logits)
        total: Any = 0.0
        for scale, image, text in zip(SCALES, images, texts, strict=True):
            target = scale * image @ text.T
            total += both_ways(divergence, target, logits) / count
            if term == "affinity":
                total += both_ways(entropy, target) / count
        return total
    if term in ("fd", "bank"):
        total = 0.0
        start = 0
        for k, (width, scale) in enumerate(zip(WIDTHS, SCALES, strict=True)):
            part = slice(start, start + width)
            start += width
            if term == "fd":
                total += ((np.sqrt(count) * s_v[:, part] - images[k]) ** 2).mean() / count
                total += ((np.sqrt(count) * s_t[:, part] - texts[k]) ** 2).mean() / count
                continue
            for student, teacher in ((s_v, images[k]), (s_t, texts[k])):
                for bank in (BANK_IMAGES[k].numpy(), BANK_TEXTS[k].numpy()):
                    gamma = scale / TEMPERATURE
                    own = gamma * np.sqrt(count) * student[:, part] @ bank.T
                    total += divergence(gamma * teacher @ bank.T, own) / (4 * count)
        return total
    t_v, t_t = (np.concatenate(parts, axis=1) / np.sqrt(count) for parts in (images, texts))
    if term == "icl":
        return (cross_entropy(CROSS_SCALE * s_v @ t_t.T) + cross_entropy(CROSS_SCALE * s_t @ t_v.T)) / 2
    if term == "vrd_kl":
        return both_ways(divergence, TEXT_SCALE * t_t @ s_t.T, IMAGE_SCALE * t_v @ s_v.T)
    if term in ("vrd_ce_image", "vrd_ce_text"):
        logits = IMAGE_SCALE * t_v @ s_v.T if term == "vrd_ce_image" else TEXT_SCALE * t_t @ s_t.T
        return both_ways(cross_entropy, logits)
    a, b = CROSS_SCALE * t_v @ s_t.T, CROSS_SCALE * t_t @ s_v.T
    return (both_ways(divergence, b, a) + both_ways(divergence, a, b)) / 2


@pytest.mark.parametrize("term", TERMS)
def test_every_term_and_its_gradient_match_numpy(term: str) -> None:
    batch = make_batch()
    assert_matches(evaluate(batch, term), batch, partial(expected, term))


def test_hrd_pulls_towards_the_mean_of_the_teachers_distributions() -> None:
    batch = make_batch()
    (gradient,) = torch.autograd.grad(evaluate(batch, "hrd"), batch.student_image)
    logits = STUDENT_SCALE * batch.student_image @ batch.student_text.T
    products = [s * v @ t.T for s, v, t in zip(SCALES, TEACHER_IMAGES, TEACHER_TEXTS, strict=True)]
    total = torch.zeros((), dtype=torch.float64)
    for rows_, targets in ((logits, products), (logits.T, [product.T for product in products])):
        mean = torch.stack([target.softmax(1) for target in targets]).mean(0)
        total = total - (mean * rows_.log_softmax(1)).sum() / (2 * ROWS)
    (expected_gradient,) = torch.autograd.grad(total, batch.student_image)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)


def test_blocks_add_up_to_the_whole() -> None:
    batch = make_batch()
    leaves = [batch.student_image, batch.student_text]
    whole = evaluate(batch, *TERMS)
    gradients = torch.autograd.grad(whole, leaves)
    blocks = [evaluate(batch, *TERMS, block=block) for block in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(sum(blocks), whole)
    torch.autograd.backward(blocks)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


def test_a_student_like_its_teachers_has_no_feature_and_no_bank_loss() -> None:
    batch = make_batch()
    assert batch.teacher_image is not None
    assert batch.teacher_text is not None
    same = EmbeddingBatch(
        batch.teacher_image.clone().requires_grad_(),
        batch.teacher_text.clone().requires_grad_(),
        batch.teacher_image,
        batch.teacher_text,
        batch.bank,
    )
    assert evaluate(same, "fd", "bank").item() == pytest.approx(0, abs=1e-12)


def test_the_same_teacher_twice_weighs_as_much_as_once() -> None:
    student, teacher = [rows(ROWS, 4, seed) for seed in (0, 1)], [rows(ROWS, 4, seed) for seed in (2, 3)]
    losses = []
    for count in (1, 2):
        weights = Weights(fd=1, hrd=1, icl=1, vrd_kl=1, vrd_ce_image=1, vrd_ce_text=1, xrd=1)
        objective = in_float64(Objective(weights, scales="raw", widths=(4 * count,) + (4,) * count))
        batch = EmbeddingBatch(*(side_by_side([part] * count) for part in (*student, *teacher)))
        scale = torch.tensor(STUDENT_SCALE, dtype=torch.float64)
        losses.append(objective(batch, scale, (12.0,) * count if count > 1 else 12.0).terms)
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], loss, msg=name)


def test_a_student_of_another_width_is_projected_to_all_teachers_together() -> None:
    objective = make_objective("fd", student_width=6)
    assert objective.image_projection.weight.shape == (sum(WIDTHS), 6)
    assert isinstance(make_objective("fd").image_projection, torch.nn.Identity)


def test_side_by_side_has_unit_rows_whose_cosines_are_mean_cosines_and_parts_give_the_teachers_back() -> None:
    images, texts = side_by_side(TEACHER_IMAGES), side_by_side(TEACHER_TEXTS)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(ROWS, dtype=torch.float64))
    cosines = [v @ t.T for v, t in zip(TEACHER_IMAGES, TEACHER_TEXTS, strict=True)]
    torch.testing.assert_close(images @ texts.T, torch.stack(cosines).mean(0))
    for part, teacher in zip(teacher_parts(images, WIDTHS), TEACHER_IMAGES, strict=True):
        torch.testing.assert_close(part, teacher)
    assert side_by_side(TEACHER_IMAGES[:1]) is TEACHER_IMAGES[0]


def test_teachers_that_share_a_text_tower_are_one_whose_similarities_are_in_proportion_to_the_mean_of_theirs() -> None:
    first, second, texts = (rows(ROWS, 4, seed) for seed in (2, 3, 4))
    alike = Ensemble((4, 4), (10.0, 14.0), share_text=True)
    assert (alike.widths, alike.logit_scale) == ((4,), 12.0)
    images = alike.join([first, second])
    v, t = ((first.numpy() + second.numpy()) / 2, texts.numpy())
    lengths = np.sqrt((v**2).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(images.numpy(), v / lengths, atol=1e-9)
    cosines = (first.numpy() @ t.T + second.numpy() @ t.T) / 2
    np.testing.assert_allclose((images @ texts.T).numpy() * lengths, cosines, atol=1e-9)
    np.testing.assert_allclose(alike.join([texts, texts]).numpy(), t, atol=1e-9)
    assert not alike.join([torch.zeros(2, 4), torch.zeros(2, 4)]).any()  # of texts alone, without images
    apart = Ensemble((4, 3), (10.0, 14.0))
    assert (apart.widths, apart.logit_scale) == ((4, 3), (10.0, 14.0))
    assert Ensemble((4,), (10.0,)).logit_scale == 10.0
    assert Ensemble((4,), (10.0,)).join([first]) is first


def test_the_number_of_scales_is_that_of_the_teachers() -> None:
    with pytest.raises(ValueError, match="1 scales were given for 2 teachers"):
        make_objective("fd")(make_batch(), torch.tensor(1.0), 12.0)
