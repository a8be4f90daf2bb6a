"""Every term and its gradients compared with the implementation of CLIP-RD's authors, in float64.

The fixture holds what theirs, https://github.com/Rosieyang01/CLIP-RD (no licence is named; no code of it is here),
computes on two processes for 24 random pairs with D = 48: `loss/TERM`, and the gradients of the student's features
before they are normalised, and of its logit scale, a, b and c. `scales` are these four, and after the first the
teacher's. All differ, so that none can stand for another.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip_rd_edge.losses.objective import Objective, Weights
from clip_rd_edge.losses.terms import EmbeddingBatch

FIXTURE = Path(__file__).parents[1] / "fixtures" / "clip_rd_losses.npz"
TERMS = ("task", "hrd", "icl", "fd", "vrd_kl", "vrd_ce_image", "vrd_ce_text", "xrd")


@pytest.fixture(scope="module")
def values() -> dict[str, np.ndarray]:
    with np.load(FIXTURE) as arrays:
        return dict(arrays)


def evaluate(values: dict[str, np.ndarray], term: str) -> tuple[Tensor, list[Tensor]]:
    """Return a term and its gradients with respect to the student's image and text features, γ_s, a, b and c."""
    objective = Objective(Weights(**{term: 1.0}), scales="raw").double()
    gamma_s, gamma_t, *abc = (torch.tensor(float(x), dtype=torch.float64) for x in values["scales"])
    gamma_s.requires_grad_()
    scales = [objective.scales.image, objective.scales.text, objective.scales.cross]
    with torch.no_grad():
        for parameter, value in zip(scales, abc, strict=True):
            parameter.copy_(value)
    image, text = (torch.tensor(values[f"student_{side}"], requires_grad=True) for side in ("image", "text"))
    batch = EmbeddingBatch(
        normalize(image, dim=-1),
        normalize(text, dim=-1),
        torch.tensor(values["teacher_image"]),
        torch.tensor(values["teacher_text"]),
    )
    loss = objective(batch, gamma_s, gamma_t).terms[term]
    leaves = [image, text, gamma_s, *scales]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return loss, [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True)]


@pytest.mark.parametrize("term", TERMS)
def test_terms_and_gradients_are_those_of_the_authors(values: dict[str, np.ndarray], term: str) -> None:
    loss, (image, text, *scales) = evaluate(values, term)
    tolerance = {"rtol": 0, "atol": 1e-9}
    np.testing.assert_allclose(loss.item(), values[f"loss/{term}"], **tolerance)
    np.testing.assert_allclose(image, values[f"grad_student_image/{term}"], **tolerance)
    np.testing.assert_allclose(text, values[f"grad_student_text/{term}"], **tolerance)
    np.testing.assert_allclose(torch.stack(scales), values[f"grad_scales/{term}"], **tolerance)
