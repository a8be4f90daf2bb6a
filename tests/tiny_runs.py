"""Runs of a tiny student, in seconds, and how tests interrupt and compare them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from support import Watch, save_tiny_teacher

from clip_rd_edge.distillation.config import RunConfig, load_recipe
from clip_rd_edge.distillation.run import run_distillation


def tiny_run(recipe_name: str, recipe: dict[str, Any], **settings: Any) -> RunConfig:
    """Return a run of `test_resnet` on small images in float32; `recipe` and `settings` change it.

    Its text tower is smaller than the smallest preset, with which a checkpoint has 76 MB and takes most of the time.
    """
    defaults: dict[str, Any] = {
        "teacher_precision": "fp32", "student": "test_resnet", "image_size": 48, "text": "64x1", "context_length": 12,
        "log_every": 1, "workers": 0,
    }  # fmt: skip
    changed = msgspec.structs.replace(load_recipe(recipe_name), **{"precision": "fp32", **recipe})
    return RunConfig(recipe_name=recipe_name, recipe=changed, **{**defaults, **settings})


def run_on_images_and_labels(pairs_csv: Path, folder: Path, **settings: Any) -> RunConfig:
    """Return a run on the 24 images of `pairs_csv` and four labels, one of them twice; `settings` change it.

    Labels and teacher are written to `folder`.
    """
    save_tiny_teacher(folder / "teacher")
    (folder / "labels.txt").write_text("red\n# a comment\ngreen\n\nblue\nred\nyellow\n")
    defaults: dict[str, Any] = {
        "images": str(pairs_csv.parent / "pictures"), "texts": str(folder / "labels.txt"),
        "templates": ("a {} picture",), "teacher": str(folder / "teacher"), "checkpoint_every": 2,
    }  # fmt: skip
    return tiny_run("clip-rd", {"steps": 6, "batch_size": 6}, **{**defaults, **settings})


def stop_at(number: int) -> Callable[[int], None]:
    """Return what ends a run after a step, for `Watch(on_step=…)`."""

    def stop(step: int) -> None:
        if step == number:
            raise MemoryError("like a kill, this saves nothing")

    return stop


def weights(student: Path) -> dict[str, torch.Tensor]:
    return load_file(student / "open_clip_model.safetensors")


def assert_same_weights(actual: Path, expected: Path) -> None:
    """Compare two students bit for bit."""
    actual_weights, expected_weights = weights(actual), weights(expected)
    assert actual_weights.keys() == expected_weights.keys()
    assert all(torch.equal(actual_weights[name], expected_weights[name]) for name in actual_weights)


def killed_and_resumed(config: RunConfig, folder: Path, *, after: int) -> Path:
    """Train a student twice, at once and with a kill after a step, and require the same weights.

    Returns:
        The run that was killed, `folder / "run"`; the other is `folder / "uninterrupted"`.
    """
    expected = run_distillation(config, folder / "uninterrupted", resume=False)
    with pytest.raises(MemoryError):
        run_distillation(config, folder / "run", resume=False, reporter=Watch(on_step=stop_at(after)))
    assert_same_weights(run_distillation(config, folder / "run", resume=True), expected)
    return folder / "run"
