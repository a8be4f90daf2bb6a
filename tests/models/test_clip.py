"""What tells a model from another one, and the image tower as it is deployed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from text_towers import bert_clip

from clip_rd_edge.models.clip import (
    ClipModel,
    evaluation_mode,
    inference_image_tower,
    model_fingerprint,
    parameter_count,
)
from clip_rd_edge.models.load import load_clip, save_clip


def test_a_model_of_the_same_weights_with_another_activation_is_another_model(
    make_student: Callable[..., ClipModel],
) -> None:
    student = make_student("test_resnet")
    other = dataclasses.replace(student, model_cfg={**student.model_cfg, "quick_gelu": True})
    assert model_fingerprint(other) != model_fingerprint(student)


def test_the_configuration_of_a_text_tower_of_hugging_face_is_part_of_a_model(tmp_path: Path) -> None:
    save_clip(tmp_path / "model", bert_clip(tmp_path / "bert"), provenance={})
    file = tmp_path / "model" / "config.json"
    written = json.loads(file.read_text())

    def fingerprint(**changes: Any) -> str:
        file.write_text(json.dumps({**written, **changes}))
        return model_fingerprint(load_clip(str(tmp_path / "model")))

    fingerprints = {
        fingerprint(**changes)
        for changes in ({}, {"hidden_act": "relu"}, {"num_attention_heads": 1}, {"layer_norm_eps": 1e-5})
    }
    assert len(fingerprints) == 4
    assert fingerprint(transformers_version="4.45.0", use_cache=False, hidden_dropout_prob=0.0) in fingerprints


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
