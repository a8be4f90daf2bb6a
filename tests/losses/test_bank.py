"""The divergence from a bank: closed form, blocks of rows, precision, what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from losses_in_numpy import rows
from torch import Tensor

from clip_rd_edge.losses import objective as shipped
from clip_rd_edge.losses.objective import Objective, Weights, bank_divergence
from clip_rd_edge.losses.terms import Bank, EmbeddingBatch

SCALE, PAIRS, WIDTH = 20.0, 6, 8


def make_batch(dtype: torch.dtype) -> EmbeddingBatch:
    student = [rows(PAIRS, WIDTH, seed).to(dtype).requires_grad_() for seed in (0, 1)]
    teacher = [rows(PAIRS, WIDTH, seed).to(dtype) for seed in (2, 3)]
    return EmbeddingBatch(*student, *teacher, bank=Bank(rows(11, WIDTH, 4).to(dtype), rows(7, WIDTH, 5).to(dtype)))


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
    class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.entries = max(self.entries, result.numel())
            return result

    monkeypatch.setattr(shipped, "BLOCK_ENTRIES", 4_000)
    student, teacher, bank = rows(64, WIDTH, 0).requires_grad_(), rows(64, WIDTH, 1), rows(1_000, 2, seed=2)
    with LargestTensor() as largest:
        bank_divergence(student[:, :2], teacher[:, :2], bank, scale=SCALE).backward()
    assert 0 < largest.entries <= 4_000


def test_the_loss_is_float32_under_autocast_and_from_a_bank_in_half_precision() -> None:
    batch, objective = make_batch(torch.float32), Objective(Weights(bank=1))
    assert batch.bank is not None
    expected = objective(batch, torch.tensor(10.0), SCALE).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = objective(batch, torch.tensor(10.0), SCALE).total
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)
    for dtype in (torch.bfloat16, torch.float16):
        half = Bank(batch.bank.image.to(dtype), batch.bank.text.to(dtype))
        raised = Bank(half.image.float(), half.text.float())
        losses = [objective(replace(batch, bank=bank), torch.tensor(10.0), SCALE).total for bank in (half, raised)]
        assert losses[0].dtype == torch.float32
        assert torch.equal(*losses)


def test_a_second_derivative_is_refused() -> None:
    batch = make_batch(torch.float64)
    total = Objective(Weights(task=1, bank=1))(batch, torch.tensor(10.0), SCALE).total
    (gradient,) = torch.autograd.grad(total, batch.student_image, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.square().sum().backward()
