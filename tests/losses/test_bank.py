"""Relations to a bank, compared with values and gradients worked out in numpy, in float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from losses_in_numpy import Array, assert_matches, rows
from torch import Tensor
from torch.nn.functional import normalize

from clip_rd_edge.losses import bank as bank_module
from clip_rd_edge.losses.bank import Bank, bank_divergence
from clip_rd_edge.losses.objective import EmbeddingBatch, Objective, Weights

SCALE, TEMPERATURE = 20.0, 2.0
PAIRS, WIDTH = 6, 8


def make_batch(dtype: torch.dtype = torch.float64, *, width: int = WIDTH) -> EmbeddingBatch:
    """A batch whose banks of images and captions differ in length."""
    student = [rows(PAIRS, width, seed).to(dtype).requires_grad_() for seed in (0, 1)]
    teacher = [rows(PAIRS, WIDTH, seed).to(dtype) for seed in (2, 3)]
    bank = Bank(rows(11, WIDTH, 4).to(dtype), rows(7, WIDTH, 5).to(dtype))
    return EmbeddingBatch(*student, *teacher, bank=bank)


def make_objective() -> Objective:
    return Objective(Weights(bank=1), bank_temperature=TEMPERATURE).double()


def expected_loss(batch: EmbeddingBatch, image: Array, text: Array) -> Any:
    """The definition, one pair and one entry of the bank after the other; also for complex embeddings."""
    assert batch.bank is not None
    assert batch.teacher_image is not None
    assert batch.teacher_text is not None
    total: Any = 0.0
    for student, teacher in ((image, batch.teacher_image.numpy()), (text, batch.teacher_text.numpy())):
        for entries in (batch.bank.image.numpy(), batch.bank.text.numpy()):
            for s, t in zip(student, teacher, strict=True):
                p = np.array([math.exp(SCALE / TEMPERATURE * sum(t * entry)) for entry in entries])
                q = np.array([np.exp(SCALE / TEMPERATURE * sum(s * entry)) for entry in entries])
                p, q = p / p.sum(), q / q.sum()
                total += sum(p * (np.log(p) - np.log(q))) / (4 * PAIRS)
    return total


def test_loss_and_gradients_match_numpy() -> None:
    batch = make_batch()
    loss = make_objective()(batch, torch.tensor(10.0), SCALE).terms["bank"]
    assert_matches(loss, batch, partial(expected_loss, batch))


def test_a_bank_of_two_orthogonal_entries_has_a_closed_form() -> None:
    axes = torch.eye(2, dtype=torch.float64)
    for scale in (0.5, 3.0, 20.0):
        divergence = bank_divergence(axes[:1], axes[1:], axes, scale=scale)
        assert divergence.item() == pytest.approx(scale * math.tanh(scale / 2), abs=1e-12)


def test_a_student_like_its_teacher_has_neither_loss_nor_gradient() -> None:
    student, bank = rows(5, WIDTH, 0).requires_grad_(), rows(9, WIDTH, 1)
    loss = bank_divergence(student, student.detach(), bank, scale=SCALE)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max().item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("boundaries", [(0, 1, 6), (0, 2, 4, 6)])
@pytest.mark.parametrize("entries", [1, 25])
def test_blocks_of_pairs_and_of_rows_add_up_to_the_whole(
    boundaries: tuple[int, ...], entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, objective = make_batch(), make_objective()
    leaves = [batch.student_image, batch.student_text]
    whole = objective(batch, torch.tensor(10.0), SCALE).total
    gradients = torch.autograd.grad(whole, leaves)
    monkeypatch.setattr(bank_module, "BLOCK_ENTRIES", entries)
    blocks = [
        objective(batch, torch.tensor(10.0), SCALE, block=slice(start, stop)).total
        for start, stop in itertools.pairwise(boundaries)
    ]
    torch.testing.assert_close(sum(blocks), whole)
    torch.autograd.backward(blocks)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


def test_no_product_exceeds_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.entries = max(self.entries, result.numel())
            return result

    monkeypatch.setattr(bank_module, "BLOCK_ENTRIES", 4_000)
    student, teacher, bank = rows(64, WIDTH, 0).requires_grad_(), rows(64, WIDTH, 1), rows(1_000, 2, seed=2)
    student, teacher = student[:, :2], teacher[:, :2]
    with LargestTensor() as largest:
        bank_divergence(student, teacher, bank, scale=SCALE).backward()
    assert 0 < largest.entries <= 4_000


def test_the_loss_is_float32_under_autocast() -> None:
    batch = make_batch(torch.float32)
    objective = Objective(Weights(bank=1))
    expected = objective(batch, torch.tensor(10.0), SCALE).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = objective(batch, torch.tensor(10.0), SCALE).total
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bank_in_half_precision_is_read_as_the_other_embeddings_are(dtype: torch.dtype) -> None:
    batch = make_batch(torch.float32)
    assert batch.bank is not None
    half = replace(batch, bank=Bank(batch.bank.image.to(dtype), batch.bank.text.to(dtype)))
    raised = replace(batch, bank=Bank(half.bank.image.float(), half.bank.text.float()))
    losses = [Objective(Weights(bank=1))(each, torch.tensor(10.0), SCALE).total for each in (half, raised)]
    assert losses[0].dtype == torch.float32
    assert torch.equal(*losses)


def test_a_second_derivative_is_refused_rather_than_left_out() -> None:
    batch = make_batch()
    total = Objective(Weights(task=1, bank=1))(batch, torch.tensor(10.0), SCALE).total
    (gradient,) = torch.autograd.grad(total, batch.student_image, create_graph=True)
    with pytest.raises(RuntimeError, match="The term of the bank has no second derivative"):
        gradient.square().sum().backward()


def test_an_empty_bank_is_refused() -> None:
    student, teacher = rows(4, WIDTH, 0), rows(4, WIDTH, 1)
    with pytest.raises(ValueError, match="The bank has no embeddings to compare with"):
        bank_divergence(student, teacher, rows(0, WIDTH, 2), scale=SCALE)


def test_a_narrower_student_is_projected_to_the_width_of_the_bank() -> None:
    batch = make_batch(width=5)
    torch.manual_seed(0)
    objective = Objective(Weights(bank=1), widths=(5, WIDTH), bank_temperature=TEMPERATURE).double()
    loss = objective(batch, torch.tensor(10.0), SCALE).total
    projected = [
        normalize(projection(student), dim=-1).detach().numpy()
        for projection, student in (
            (objective.image_projection, batch.student_image),
            (objective.text_projection, batch.student_text),
        )
    ]
    assert loss.item() == pytest.approx(expected_loss(batch, *projected), abs=1e-9)
    loss.backward()
    assert objective.image_projection.weight.grad.abs().max() > 0  # type: ignore[union-attr]
