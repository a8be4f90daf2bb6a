"""Averages of two models, and the accuracy between them."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import clip_rd_edge as edge
from clip_rd_edge.errors import ConfigError, UsageError
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.edit import average_models, interpolate_clip
from clip_rd_edge.models.load import load_clip, save_clip
from clip_rd_edge.models.students import build_student, student_config
from clip_rd_edge.utils.paths import typed

RECORD = {"recipe": "clip", "data": "emoji", "evaluation": {"x": 1.0}, "date": "2020-01-01T00:00:00+00:00"}


def build(seed: int, *, text_cfg: dict[str, Any] | None = None, **changes: Any) -> ClipModel:
    torch.manual_seed(seed)
    settings = {"embedding_size": 16, "image_size": 32, "text": "64x1", "context_length": 8, **changes}
    config = student_config("test_resnet", **settings)
    config["model_cfg"]["text_cfg"] |= text_cfg or {}
    return build_student(config, name=f"model {seed}")


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and the same with other weights, with a record of its training."""
    save_clip(tmp_path / "first", build(0), provenance={})
    save_clip(tmp_path / "second", build(1), provenance=RECORD)
    return tmp_path / "first", tmp_path / "second"


def test_weights_and_statistics_are_interpolated_and_counters_taken_from_after(tmp_path: Path) -> None:
    before, after = build(0), build(1)
    after.model(torch.randn(4, 3, 32, 32), torch.ones(4, 8, dtype=torch.long))  # moves the batch norms' statistics
    old, new = ({k: v.clone() for k, v in clip.model.state_dict().items()} for clip in (before, after))
    for share in (0.0, 0.75, 1.0):
        between = interpolate_clip(before, after, share=share).model.state_dict()
        assert any(name.endswith("running_mean") for name in between)
        for name, tensor in between.items():
            exact = (1 - share) * old[name] + share * new[name] if tensor.is_floating_point() else new[name]
            torch.testing.assert_close(tensor, exact)
    assert all(torch.equal(tensor, new[name]) for name, tensor in after.model.state_dict().items())
    with pytest.raises(UsageError):
        average_models((typed("a"), typed("b")), tmp_path / "average", weight=1.5)


def test_the_result_has_the_weights_between_and_the_record_of_the_training(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    result = edge.average(*models, tmp_path / "between", weight=0.25)
    assert (result.weight, result.curve, Path(result)) == (0.25, (), tmp_path / "between")
    first, second, between = (load_clip(typed(os.fspath(path))).model.state_dict() for path in (*models, result))
    for name, tensor in between.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, 0.75 * first[name] + 0.25 * second[name])
    record = json.loads((result.folder / "distillation.json").read_text())
    assert (record["recipe"], record["average"]["weight"], record["average"]["chosen_by"]) == ("clip", 0.25, "user")
    assert record["average"]["models"] == ["first", "second"]
    assert len(set(record["average"]["sha256"])) == 2
    assert "evaluation" not in record
    assert record["date"] != RECORD["date"]


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7, 9, 8, 0], 0.8),
        ([5, 1, 1, 1, 1, 1, 5, 1, 1, 1, 5], 0.6),  # of equal ones, the nearest to the middle
    ],
)
def test_the_best_weight_has_the_highest_mean(
    models: tuple[Path, Path], tmp_path: Path, scores: list[int], best: float
) -> None:
    measured = iter({"new": value / 10, "old": 1 - value / 20} for value in scores)
    names = typed(models[0]), typed(models[1])
    result = average_models(names, tmp_path / "between", weight="best", score=lambda encoder: next(measured))
    assert result.weight == best
    record = json.loads((tmp_path / "between" / "distillation.json").read_text())
    assert (record["average"]["weight"], record["average"]["chosen_by"]) == (best, "best")


def test_models_that_differ_in_more_than_their_weights_are_refused(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {"text_cfg": {"no_causal_mask": True}}, {"image_size": 64},
    ]  # fmt: skip
    save_clip(tmp_path / "first", build(0), provenance={})
    others = [build(1, **change) for change in changes]
    seen = msgspec.structs.replace(others[0].preprocessing, resize_mode="squash")
    others.append(dataclasses.replace(build(1), preprocessing=seen))
    for number, other in enumerate(others):
        save_clip(tmp_path / str(number), other, provenance={})
        with pytest.raises(ConfigError):
            edge.average(tmp_path / "first", tmp_path / str(number), tmp_path / "between")
    assert not (tmp_path / "between").exists()
