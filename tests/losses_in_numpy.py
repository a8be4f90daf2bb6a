"""The parts of the losses in numpy and float64, and their derivatives by complex steps, to compare the terms with."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from clip_rd_edge.losses.objective import Objective
from clip_rd_edge.losses.terms import EmbeddingBatch

Array = np.ndarray[Any, Any]
STUDENT_SCALE, IMAGE_SCALE, TEXT_SCALE, CROSS_SCALE = 8.0, 3.0, 4.0, 5.0
_STEP = 1e-30


def rows(count: int, width: int, seed: int) -> Tensor:
    """Return random unit rows, (count, width) float64."""
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=-1)


def in_float64(objective: Objective) -> Objective:
    """Return the objective in float64, with the scales of this module."""
    objective = objective.double()
    with torch.no_grad():
        for name, value in (("image", IMAGE_SCALE), ("text", TEXT_SCALE), ("cross", CROSS_SCALE)):
            objective.scales.get_parameter(name).fill_(value)
    return objective


def log_softmax(row: Array) -> Array:
    return row - np.log(sum(np.exp(row)))  # type: ignore[no-any-return]


def cross_entropy(logits: Array) -> Any:
    return -sum(log_softmax(row)[i] for i, row in enumerate(logits)) / len(logits)


def entropy(logits: Array) -> Any:
    return -sum(sum(np.exp(log_softmax(row)) * log_softmax(row)) for row in logits) / len(logits)


def divergence(target: Array, logits: Array) -> Any:
    """KL of the rows, where no derivative reaches the target: the imaginary part is that of a complex step."""
    total: Any = 0.0
    for t, row in zip(target.real, logits, strict=True):
        p = np.exp(log_softmax(t))
        total += sum(p * (np.log(p) - log_softmax(row)))
    return total / len(target)


def both_ways(part: Callable[..., Any], *logits: Array) -> Any:
    """Return the mean of a part over the images and over the texts: of the products, and of their transposes."""
    return (part(*logits) + part(*(product.T for product in logits))) / 2


def assert_matches(loss: Tensor, batch: EmbeddingBatch, expected: Callable[[Array, Array], Any]) -> None:
    """Check a loss, and its gradients with respect to every entry of the student's embeddings.

    Args:
        expected: returns the loss of images and texts, real or complex.
    """
    # Of some terms, no gradient reaches the text side, or the image side.
    leaves = [batch.student_image, batch.student_text]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    image, text = (leaf.detach().numpy() for leaf in leaves)
    assert loss.item() == pytest.approx(expected(image, text), abs=1e-9)
    for side, (i, j) in itertools.product((0, 1), itertools.product(*map(range, image.shape))):
        # A complex step gives the derivative without the cancellation of a difference.
        moved = [image.astype(complex), text.astype(complex)]
        moved[side][i, j] += 1j * _STEP
        assert gradients[side][i, j].item() == pytest.approx(expected(*moved).imag / _STEP, abs=1e-9)


class LargestTensor(TorchDispatchMode):
    """Records the number of entries of the largest tensor that an operation returns."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.entries = max(self.entries, output.numel() if isinstance(output, Tensor) else 0)
        return output
