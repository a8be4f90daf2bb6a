from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from clip_rd_edge.losses.objective import Objective, Scales, Weights
from clip_rd_edge.losses.terms import EmbeddingBatch

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
