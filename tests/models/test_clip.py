"""What tells a model from another one, and the image tower as it is deployed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from clip_rd_edge.models.clip import (
    ClipModel,
    deployed_parameter_count,
    evaluation_mode,
    inference_image_tower,
    model_fingerprint,
    parameter_count,
)


def test_a_model_of_the_same_weights_with_another_activation_is_another_model(
    make_student: Callable[..., ClipModel],
) -> None:
    student = make_student("test_resnet")
    other = dataclasses.replace(student, model_cfg={**student.model_cfg, "quick_gelu": True})
    assert model_fingerprint(other) != model_fingerprint(student)


def test_the_place_of_a_text_tower_is_no_part_of_a_model(make_student: Callable[..., ClipModel]) -> None:
    student = make_student("test_resnet")
    text_cfg = {**student.model_cfg["text_cfg"], "hf_model_name": "/elsewhere"}
    moved = dataclasses.replace(student, model_cfg={**student.model_cfg, "text_cfg": text_cfg})
    assert model_fingerprint(moved) == model_fingerprint(student)


def test_branches_are_merged_in_a_copy_that_gives_the_same_embeddings(make_student: Callable[..., ClipModel]) -> None:
    model = make_student("mobileone_s0").model
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tower = inference_image_tower(model)
    assert parameter_count(tower) < parameter_count(model)
    assert tower.model.get_submodule("text") is model.get_submodule("text")
    pixels = torch.randn(2, 3, 32, 32)
    with evaluation_mode(model), evaluation_mode(tower), torch.no_grad():
        torch.testing.assert_close(tower(pixels), tower.__class__(model)(pixels), atol=1e-5, rtol=0)
    after = model.state_dict()
    assert weights.keys() == after.keys()
    assert all(torch.equal(weights[name], after[name]) for name in weights)


def test_an_evaluation_after_training_sees_the_attention_biases_that_were_learned() -> None:
    class Attention(torch.nn.Module):
        """As in timm 1.0.13."""

        def __init__(self) -> None:
            super().__init__()
            self.biases, self.attention_bias_cache = torch.nn.Parameter(torch.zeros(2)), dict[str, torch.Tensor]()

        def forward(self) -> torch.Tensor:
            return self.biases if self.training else self.attention_bias_cache.setdefault("cpu", self.biases + 0)

    model = Attention()
    for learned in (1.0, 2.0):
        model.biases.data.fill_(learned)
        with evaluation_mode(model), torch.no_grad():
            assert model().tolist() == [learned, learned]


def test_the_parameters_of_a_deployed_model_are_those_of_its_merged_branches(
    make_student: Callable[..., ClipModel],
) -> None:
    model = make_student("mobileone_s0").model
    image, both = (deployed_parameter_count(model, text_tower=text_tower) for text_tower in (False, True))
    assert image < parameter_count(model.get_submodule("visual")) / 3
    assert both - image == parameter_count(model) - parameter_count(model.get_submodule("visual"))


def test_a_trunk_without_branches_is_not_copied(student: ClipModel) -> None:
    assert inference_image_tower(student.model).model is student.model


def test_a_trunk_that_timm_cannot_merge_stays_as_it_was_trained(
    make_student: Callable[..., ClipModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_student("mobileone_s0").model
    monkeypatch.setattr(type(model.get_submodule("visual.trunk.stem")), "reparameterize", lambda _: 1 / 0)
    assert inference_image_tower(model).model is model
