"""The divergence from a bank: blocks of rows, and precision."""

from __future__ import annotations

import pytest
import torch
from losses_in_numpy import LargestTensor, rows

from clip_rd_edge.losses import objective as shipped
from clip_rd_edge.losses.objective import Objective, Weights, bank_divergence
from clip_rd_edge.losses.terms import Bank, EmbeddingBatch

SCALE, PAIRS, WIDTH = 20.0, 6, 8


@pytest.mark.parametrize("entries", [1, 25])
def test_blocks_of_rows_add_up_to_the_whole(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, bank = rows(PAIRS, WIDTH, 0).requires_grad_(), rows(PAIRS, WIDTH, 1), rows(11, WIDTH, 2)
    whole = bank_divergence(student, teacher, bank, scale=SCALE)
    (expected,) = torch.autograd.grad(whole, student)
    monkeypatch.setattr(shipped, "BLOCK_ENTRIES", entries)
    in_blocks = bank_divergence(student, teacher, bank, scale=SCALE)
    torch.testing.assert_close(in_blocks, whole)
    torch.testing.assert_close(torch.autograd.grad(in_blocks, student)[0], expected)


def test_no_product_exceeds_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "BLOCK_ENTRIES", 4_000)
    student, teacher, bank = rows(64, WIDTH, 0).requires_grad_(), rows(64, WIDTH, 1), rows(1_000, 2, seed=2)
    with LargestTensor() as largest:
        bank_divergence(student[:, :2], teacher[:, :2], bank, scale=SCALE).backward()
    assert 0 < largest.entries <= 4_000


def test_the_loss_is_float32_under_autocast_and_from_a_bank_in_half_precision() -> None:
    objective, embeddings = Objective(Weights(bank=1)), [rows(PAIRS, WIDTH, seed).float() for seed in range(4)]
    half = Bank(rows(11, WIDTH, 4).half(), rows(7, WIDTH, 5).half())
    raised = EmbeddingBatch(*embeddings, bank=Bank(half.image.float(), half.text.float()))
    expected = objective(raised, torch.tensor(10.0), SCALE).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = objective(EmbeddingBatch(*embeddings, bank=half), torch.tensor(10.0), SCALE).total
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)
