"""Every term and its gradients compared with the published reference implementation, in float64.

The smaller case of the reference is a fixture in the repository. The larger case is read from the reference folder
beside the checkout, if it exists.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip_rd_edge.losses.objective import EmbeddingBatch, Objective, Weights

FIXTURE = Path(__file__).parents[1] / "fixtures" / "clip_rd_losses.npz"
FULL = Path(__file__).parents[3] / "shared" / "reference" / "clip_rd_losses.npz"
TERMS = ("task", "hrd", "icl", "fd", "vrd_kl", "vrd_ce_image", "vrd_ce_text", "xrd")


def reference(case: str) -> dict[str, np.ndarray]:
    path = FIXTURE if case == "init" else FULL
    if not path.is_file():
        pytest.skip("the reference folder is not beside this checkout")
    with np.load(path) as arrays:
        return {key.removeprefix(f"{case}/"): arrays[key] for key in arrays.files if key.startswith(f"{case}/")}


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


@pytest.mark.parametrize("case", ["init", "trained"])
@pytest.mark.parametrize("term", TERMS)
def test_terms_and_gradients_match_the_reference(case: str, term: str) -> None:
    values = reference(case)
    loss, (image, text, *scales) = evaluate(values, term)
    tolerance = {"rtol": 0, "atol": 1e-9}
    np.testing.assert_allclose(loss.item(), values[f"loss/{term}"], **tolerance)
    np.testing.assert_allclose(image, values[f"grad_student_image/{term}"], **tolerance)
    np.testing.assert_allclose(text, values[f"grad_student_text/{term}"], **tolerance)
    np.testing.assert_allclose(torch.stack(scales), values[f"grad_scales/{term}"], **tolerance)
