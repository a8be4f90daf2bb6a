from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn.functional import normalize

from clip_rd_edge.errors import ConfigError
from clip_rd_edge.losses.logits import Logits, Scales
from clip_rd_edge.losses.objective import EmbeddingBatch, Objective, Weights
from clip_rd_edge.losses.terms import affinity_mimicking, relation_divergence

ALL = Weights(task=1, fd=2000, icl=1, hrd=1, vrd_kl=1, vrd_ce_image=1, vrd_ce_text=1, xrd=1)


def whole(logits: torch.Tensor) -> Logits:
    return Logits(logits, logits.T, logits.diagonal(), is_whole=True)


def batch(size: int = 6, width: int = 8, dtype: torch.dtype = torch.float32) -> EmbeddingBatch:
    generator = torch.Generator().manual_seed(0)
    rows = [normalize(torch.randn(size, width, generator=generator), dim=-1).to(dtype) for _ in range(4)]
    return EmbeddingBatch(*rows)


def test_the_total_is_the_weighted_sum_of_the_terms() -> None:
    result = Objective(ALL)(batch(), torch.tensor(10.0), 20.0)
    expected = sum(weight * result.terms[name] for name, weight in ALL.active().items())
    torch.testing.assert_close(result.total, expected)


def test_terms_of_weight_zero_are_not_computed() -> None:
    student_only = EmbeddingBatch(batch().student_image, batch().student_text)
    result = Objective(Weights(task=1))(student_only, torch.tensor(10.0), 0.0)
    assert set(result.terms) == {"task"}


def test_clip_rd_computes_six_products() -> None:
    class ProductCounter(torch.utils._python_dispatch.TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.products += func is torch.ops.aten.mm.default
            return func(*args, **(kwargs or {}))

    objective, embeddings = Objective(ALL), batch()
    with ProductCounter() as counter:
        objective(embeddings, torch.tensor(10.0), 20.0)
    assert counter.products == 6


def test_logits_are_float32_under_autocast_and_from_bfloat16() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = Objective(ALL)(batch(dtype=torch.bfloat16), torch.tensor(10.0), 20.0)
    assert result.total.dtype == torch.float32
    assert all(term.dtype == torch.float32 for term in result.terms.values())


def test_an_objective_without_terms_is_refused() -> None:
    with pytest.raises(ConfigError, match="All weights of the objective are 0"):
        Objective(Weights())


def test_affinity_mimicking_is_hrd_plus_the_teachers_entropy() -> None:
    target, logits = torch.randn(5, 5, dtype=torch.float64), torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    entropy = sum(-(p := t.softmax(1)).mul(p.log()).sum(1).mean() for t in (target, target.T)) / 2
    hrd = relation_divergence(whole(target), whole(logits))
    torch.testing.assert_close(affinity_mimicking(whole(target), whole(logits)), hrd + entropy)


def test_no_gradient_reaches_the_target() -> None:
    target, logits = torch.randn(5, 5, requires_grad=True), torch.randn(5, 5, requires_grad=True)
    relation_divergence(whole(target), whole(logits)).backward()
    assert target.grad is None
    assert logits.grad is not None


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


def test_raw_scales_have_no_range() -> None:
    scales = Scales("raw")
    with torch.no_grad():
        scales.cross.fill_(-3.0)
    scales.clamp_()
    assert scales.multiplier(scales.cross).item() == -3.0


def test_scales_start_at_the_published_multiplier() -> None:
    for kind in ("bounded", "raw"):
        scales = Scales(kind)
        assert scales.multiplier(scales.image).item() == pytest.approx(math.log(1 / 0.07), rel=1e-6)


ALL_WITH_AFFINITY = Weights(task=1, fd=2000, icl=1, hrd=1, affinity=1, vrd_kl=1, vrd_ce_image=1, vrd_ce_text=1, xrd=1)


@pytest.mark.parametrize("boundaries", [(0, 6), (0, 1, 6), (0, 2, 4, 6)])
def test_blocks_add_up_to_the_whole_with_the_same_gradients(boundaries: tuple[int, ...]) -> None:
    objective = Objective(ALL_WITH_AFFINITY).double()
    parameters = [torch.tensor(10.0, dtype=torch.float64, requires_grad=True), *objective.parameters()]
    embeddings = batch(dtype=torch.float64)
    leaves = [embeddings.student_image.requires_grad_(), embeddings.student_text.requires_grad_(), *parameters]

    expected = objective(embeddings, parameters[0], 20.0)
    gradients = torch.autograd.grad(expected.total, leaves)
    blocks = [
        objective(embeddings, parameters[0], 20.0, block=slice(start, stop))
        for start, stop in itertools.pairwise(boundaries)
    ]
    for name, value in expected.terms.items():
        torch.testing.assert_close(sum(block.terms[name] for block in blocks), value)
    for block in blocks:
        block.total.backward()
    for leaf, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)
