from __future__ import annotations

import math

import pytest
import torch
from losses_in_numpy import LargestTensor, rows
from torch.nn.functional import normalize

from clip_rd_edge.losses import objective as shipped
from clip_rd_edge.losses.objective import Objective, Scales, Weights, bank_divergence
from clip_rd_edge.losses.terms import Bank, EmbeddingBatch

ALL = Weights(task=1, fd=2000, icl=1, hrd=1, vrd_kl=1, vrd_ce_image=1, vrd_ce_text=1, xrd=1)


def batch(size: int = 6, width: int = 8, dtype: torch.dtype = torch.float32) -> EmbeddingBatch:
    generator = torch.Generator().manual_seed(0)
    rows = [normalize(torch.randn(size, width, generator=generator), dim=-1).to(dtype) for _ in range(4)]
    return EmbeddingBatch(*rows)


def test_the_total_is_the_weighted_sum_of_the_terms() -> None:
    result = Objective(ALL)(batch(), torch.tensor(10.0), 20.0)
    expected = sum(weight * result.terms[name] for name, weight in ALL.items())
    torch.testing.assert_close(result.total, expected)


def test_logits_are_float32_under_autocast_and_from_bfloat16() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = Objective(ALL)(batch(dtype=torch.bfloat16), torch.tensor(10.0), 20.0)
    assert result.total.dtype == torch.float32
    assert all(term.dtype == torch.float32 for term in result.terms.values())


@pytest.mark.parametrize("value", [-50.0, 50.0])
def test_bounded_scales_stay_in_range_and_can_return(value: float) -> None:
    scales = Scales("bounded")
    with torch.no_grad():
        scales.cross.fill_(value)
    assert 1.0 <= scales.multiplier(scales.cross).item() <= 100.0
    scales.clamp_()
    multiplier = scales.multiplier(scales.cross)
    (gradient,) = torch.autograd.grad(multiplier, scales.cross)
    assert gradient.item() != 0.0


def test_raw_scales_have_no_range_and_both_kinds_start_at_the_published_multiplier() -> None:
    for kind in ("bounded", "raw"):
        scales = Scales(kind)  # type: ignore[arg-type]
        for parameter in scales.parameters():
            assert scales.multiplier(parameter).item() == pytest.approx(math.log(1 / 0.07), rel=1e-6)
    with torch.no_grad():
        scales.cross.fill_(-3.0)
    scales.clamp_()
    assert scales.multiplier(scales.cross).item() == -3.0


SCALE, PAIRS, WIDTH = 20.0, 6, 8


@pytest.mark.parametrize("entries", [1, 25])
def test_blocks_of_rows_of_the_bank_add_up_to_the_whole(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, bank = rows(PAIRS, WIDTH, 0).requires_grad_(), rows(PAIRS, WIDTH, 1), rows(11, WIDTH, 2)
    whole = bank_divergence(student, teacher, bank, scale=SCALE)
    (expected,) = torch.autograd.grad(whole, student)
    monkeypatch.setattr(shipped, "BLOCK_ENTRIES", entries)
    in_blocks = bank_divergence(student, teacher, bank, scale=SCALE)
    torch.testing.assert_close(in_blocks, whole)
    torch.testing.assert_close(torch.autograd.grad(in_blocks, student)[0], expected)


def test_no_product_with_the_bank_exceeds_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "BLOCK_ENTRIES", 4_000)
    student, teacher, bank = rows(64, WIDTH, 0).requires_grad_(), rows(64, WIDTH, 1), rows(1_000, 2, seed=2)
    with LargestTensor() as largest:
        bank_divergence(student[:, :2], teacher[:, :2], bank, scale=SCALE).backward()
    assert 0 < largest.entries <= 4_000


def test_the_loss_of_the_bank_is_float32_under_autocast_and_from_a_bank_in_half_precision() -> None:
    objective, embeddings = Objective(Weights(bank=1)), [rows(PAIRS, WIDTH, seed).float() for seed in range(4)]
    half = Bank(rows(11, WIDTH, 4).half(), rows(7, WIDTH, 5).half())
    raised = EmbeddingBatch(*embeddings, bank=Bank(half.image.float(), half.text.float()))
    expected = objective(raised, torch.tensor(10.0), SCALE).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = objective(EmbeddingBatch(*embeddings, bank=half), torch.tensor(10.0), SCALE).total
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)
