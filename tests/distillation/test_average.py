"""Averages of two models, and the accuracy between them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import Watch
from torch import nn

import clip_rd_edge as edge
from clip_rd_edge.bundle.runs import was_quantized_in_training
from clip_rd_edge.distillation import average
from clip_rd_edge.errors import ConfigError, UsageError
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.load import load_clip, save_clip
from clip_rd_edge.models.students import build_student, student_config

Run = Callable[..., tuple[int, str, str]]
RECORD = {"recipe": "clip", "data": "emoji", "evaluation": {"x": 1.0}, "date": "2020-01-01T00:00:00+00:00"}


def build(seed: int, **changes: Any) -> ClipModel:
    torch.manual_seed(seed)
    settings = {"embedding_size": 16, "image_size": 32, "text": "64x1", "context_length": 8, **changes}
    return build_student(student_config("test_resnet", **settings), name=f"model {seed}")


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and the same with other weights, with a record of its training."""
    save_clip(tmp_path / "first", build(0), provenance={})
    save_clip(tmp_path / "second", build(1), provenance=RECORD)
    return tmp_path / "first", tmp_path / "second"


@pytest.fixture
def task(colour_images: Path, tmp_path: Path) -> Path:
    """Images of three labels."""
    for colour in ("red", "green", "blue"):
        (tmp_path / "task" / colour).mkdir(parents=True)
        (path,) = colour_images.glob(f"{colour}.*")
        (tmp_path / "task" / colour / path.name).write_bytes(path.read_bytes())
    return tmp_path / "task"


def test_the_weights_are_between_those_of_both(models: tuple[Path, Path], tmp_path: Path) -> None:
    result = edge.average(*models, tmp_path / "between", weight=0.25)
    assert (result.weight, result.curve, Path(result)) == (0.25, (), tmp_path / "between")
    first, second, between = (load_clip(os.fspath(path)).model.state_dict() for path in (*models, result))
    for name, tensor in between.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, 0.75 * first[name] + 0.25 * second[name])


def test_the_result_keeps_the_record_of_the_training(models: tuple[Path, Path], tmp_path: Path) -> None:
    record = json.loads((edge.average(*models, tmp_path / "between").folder / "distillation.json").read_text())
    assert (record["recipe"], record["average"]["weight"], record["average"]["chosen_by"]) == ("clip", 0.5, "user")
    assert record["average"]["models"] == ["first", "second"]
    assert len(set(record["average"]["sha256"])) == 2
    assert "evaluation" not in record
    assert record["date"] != RECORD["date"]


def test_weights_trained_for_int8_are_told_from_those_that_were_not(tmp_path: Path) -> None:
    names = {"plain": {"quantize": None}, "int8": {"quantize": "int8", "tuned_share": 0.5}}
    names["start"] = {"quantize": "int8", "tuned_share": 0.0}  # of which the trained weights have no share
    for seed, (name, configuration) in enumerate(names.items()):
        save_clip(tmp_path / name, build(seed), provenance={"configuration": configuration})
    for first, second, weight in (("plain", "int8", 0.5), ("plain", "int8", 0.0), ("int8", "plain", 0.0)):
        edge.average(tmp_path / first, tmp_path / second, tmp_path / f"{first}-{second}-{weight}", weight=weight)
    adapted = {path.name for path in tmp_path.iterdir() if was_quantized_in_training(str(path))}
    assert adapted == {"int8", "plain-int8-0.5", "int8-plain-0.0"}


def test_the_curve_goes_from_one_model_to_the_other(models: tuple[Path, Path], task: Path, tmp_path: Path) -> None:
    result = edge.average(*models, tmp_path / "between", weight=0.35, tasks=str(task))
    assert [point.weight for point in result.curve] == sorted([*(number / 10 for number in range(11)), 0.35])
    for path, point in zip((*models, result), (result.curve[0], result.curve[-1], result.curve[4]), strict=True):
        (score,) = edge.evaluate(path, str(task))
        assert point.scores == {"task": score.top1}  # type: ignore[union-attr]
    record = json.loads((tmp_path / "between" / "distillation.json").read_text())
    assert record["average"]["curve"][4] == {"weight": 0.35, "scores": result.curve[4].scores}
    assert (tmp_path / "between" / "average.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7, 9, 8, 0], 0.8),
        ([5, 1, 1, 1, 1, 1, 5, 1, 1, 1, 5], 0.6),  # of equal ones, the nearest to the middle
    ],
)
def test_the_best_weight_has_the_highest_mean(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scores: list[int], best: float
) -> None:
    measured = iter([score for value in scores for score in (value / 10, 1 - value / 20)])  # of two tasks
    monkeypatch.setattr(average, "evaluate", lambda encoder, task: next(measured))
    monkeypatch.setattr(average, "primary_metric", lambda score: score)
    tasks: Any = [SimpleNamespace(name=name) for name in ("new", "old")]
    result = average.average_models((str(models[0]), str(models[1])), tmp_path / "between", weight="best", tasks=tasks)
    assert result.weight == best
    record = json.loads((tmp_path / "between" / "distillation.json").read_text())
    assert (record["average"]["weight"], record["average"]["chosen_by"]) == (best, "best")


def other_activation(clip: ClipModel) -> ClipModel:
    """The same weights, another function: only the names of modules show it."""
    clip.model.text.transformer.resblocks[0].mlp.gelu = nn.ReLU()  # type: ignore[union-attr, index]
    return clip


class TokenizerWithWords:
    """As open_clip's `HFTokenizer`; every text has the same ids."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, texts: list[str]) -> torch.Tensor:
        return torch.ones(len(texts), 8, dtype=torch.long)


@pytest.mark.parametrize("change", [{"heads": 2}, {"no_causal_mask": True}, {"pool_type": "last"}])
def test_models_that_compute_otherwise_with_the_same_weights_are_refused(change: dict[str, Any]) -> None:
    config = student_config("test_resnet", embedding_size=16, image_size=32, text="64x1", context_length=8)
    torch.manual_seed(1)
    first, config["model_cfg"]["text_cfg"] = build(0), {**config["model_cfg"]["text_cfg"], **change}
    second = build_student(config, name="second")
    assert repr(second.model) == repr(first.model)
    with pytest.raises(ConfigError, match="model 0 and second have different architectures"):
        average.require_same_model(first, second)


def test_models_that_differ_in_more_than_their_weights_are_refused() -> None:
    first = build(0)
    average.require_same_model(first, build(1))
    for other, message in (
        (build(1, embedding_size=24), "model 0 and model 1 have different architectures"),
        (other_activation(build(1)), "different architectures"),
        (build(1, image_size=64), "different preprocessing of images"),
    ):
        with pytest.raises(ConfigError, match=message):
            average.require_same_model(first, other)
    other = build(1)
    object.__setattr__(other, "tokenizer", lambda texts: torch.zeros(len(texts), 8, dtype=torch.long))
    with pytest.raises(ConfigError, match="different tokenizers"):
        average.require_same_model(first, other)
    trimmed = [build(seed) for seed in (0, 1)]  # to as many tokens, of which a text may show no difference
    for clip, words in zip(trimmed, ({"cat": 1, "dog": 2}, {"cat": 1, "elk": 2}), strict=True):
        inner = SimpleNamespace(get_vocab=lambda words=words: words)
        object.__setattr__(clip, "tokenizer", TokenizerWithWords(inner))
    with pytest.raises(ConfigError, match="different tokenizers"):
        average.require_same_model(*trimmed)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight": "best"}, UsageError, "no task to measure it on"),
        ({"weight": "most"}, UsageError, "The weight is 'most'; expected a number from 0 to 1, or best"),
        ({"weight": 1.5}, ConfigError, r"is 1\.5; expected a number from 0 to 1"),
        ({"tasks": "emoji:unseen"}, edge.InputError, "No task named 'emoji:unseen'"),
    ],
)
def test_wrong_options_leave_nothing(
    models: tuple[Path, Path], tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        edge.average(*models, tmp_path / "between", **options)
    assert not (tmp_path / "between").exists()


def test_an_output_that_is_in_use_or_holds_a_model_is_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    edge.average(*models, tmp_path / "between")
    with pytest.raises(UsageError, match="already exists and is not empty"):
        edge.average(*models, tmp_path / "between")
    assert edge.average(*models, tmp_path / "between", weight=1, force=True).weight == 1
    for folder in (models[0], tmp_path):
        with pytest.raises(UsageError, match=r"The output .* (is|contains) .*first.*, which it would replace"):
            edge.average(*models, folder, force=True)


def test_what_is_put_there_meanwhile_is_kept(models: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint = tmp_path / "between" / "checkpoints" / "step-5000"
    watch = Watch("loading both models", lambda step: checkpoint.mkdir(parents=True))
    with pytest.raises(UsageError, match="already exists and is not empty"):
        edge.average(*models, tmp_path / "between", reporter=watch)
    assert [path.name for path in checkpoint.parents[1].iterdir()] == ["checkpoints"]


def test_the_command_prints_a_table_and_the_name_of_the_model(
    command_line: Run, models: tuple[Path, Path], task: Path, tmp_path: Path
) -> None:
    between = tmp_path / "between"
    code, output, error = command_line("average", *models, "--weight", "Best", "--task", task, "-o", between)
    assert (code, output.strip()) == (0, f"local-dir:{between}")
    assert "Weight of the second" in error
    assert error.count("←") == 1
    assert command_line("export", between, "-o", tmp_path / "bundle", "--precision", "fp32")[0] == 0
    for weight in ("2", "half"):
        code, _, error = command_line("average", *models, "--weight", weight, "-o", tmp_path / "other")
        assert (code, f"'{weight}' is neither a number from 0 to 1 nor 'best'" in error) == (2, True)
