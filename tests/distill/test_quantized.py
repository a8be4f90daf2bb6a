"""Quantisation-aware runs of a few steps on a tiny student."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from clip_rd_edge.contract.checkpoint import WEIGHTS_FILE
from clip_rd_edge.distill.config import QUANTIZED, RunConfig, load_recipe
from clip_rd_edge.distill.metrics import Progress, read_metrics
from clip_rd_edge.distill.run import run_distillation
from clip_rd_edge.errors import UsageError
from clip_rd_edge.models.checkpoint import save_clip
from clip_rd_edge.models.student import build_student, student_config

STEPS = 5


def saved(folder: Path, trunk: str, *, image_size: int = 48) -> Path:
    torch.manual_seed(1)
    config = student_config(trunk, embedding_size=24, image_size=image_size, text="tiny", context_length=12)
    save_clip(folder, build_student(config, name=trunk), provenance={})
    return folder


@pytest.fixture
def config(pairs_csv: Path, tmp_path: Path) -> RunConfig:
    recipe = msgspec.structs.replace(load_recipe("clip-rd"), **{**QUANTIZED, "steps": STEPS, "batch_size": 6})
    return RunConfig(
        recipe_name="clip-rd",
        recipe=recipe,
        data=str(pairs_csv),
        teacher=str(saved(tmp_path / "teacher", "test_resnet")),
        teacher_precision="fp32",
        student=str(saved(tmp_path / "trained", "test_efficientnet")),
        quantize="int8",
        checkpoint_every=2,
        log_every=1,
        workers=0,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS_FILE)


def test_it_trains_what_is_exported_and_goes_on_where_it_was_killed(config: RunConfig, tmp_path: Path) -> None:
    import open_clip

    whole = run_distillation(config, tmp_path / "whole", resume=False)
    before, after = weights(Path(config.student)), weights(whole)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any("running" in name or "num_batches" in name for name in changed)
    assert {"visual.trunk.conv_stem.weight", "visual.trunk.bn1.weight", "text.text_projection"} <= changed
    assert "quantize: int8" in (tmp_path / "whole" / "config.yaml").read_text()
    open_clip.create_model(f"local-dir:{whole}", require_pretrained=True).load_state_dict(after)

    def kill(progress: Progress) -> None:
        if progress.step == 3:
            raise MemoryError

    with pytest.raises(MemoryError):
        run_distillation(config, tmp_path / "killed", resume=False, on_progress=kill)
    resumed = weights(run_distillation(config, tmp_path / "killed", resume=True))
    assert all(torch.equal(after[name], resumed[name]) for name in after)


@pytest.mark.slow
def test_its_loss_is_that_of_the_rounded_tower(config: RunConfig, tmp_path: Path) -> None:
    one = msgspec.structs.replace(config.recipe, steps=1)
    losses = []
    for name, quantize in (("int8", "int8"), ("float", None)):
        run_distillation(msgspec.structs.replace(config, recipe=one, quantize=quantize), tmp_path / name, resume=False)
        losses.append(read_metrics(tmp_path / name)[0]["loss"])
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"student": "mobilevit_xxs"}, "fine-tunes a trained student, and mobilevit_xxs is one that is still to be"),
        ({"compile": True}, "--compile does not go with --quantize"),
        ({"gradient_checkpointing": True}, "--gradient-checkpointing does not go with --quantize"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    config: RunConfig, tmp_path: Path, change: dict[str, object], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        run_distillation(msgspec.structs.replace(config, **change), tmp_path / "run", resume=False)
    assert not (tmp_path / "run").exists()


def test_other_precisions_and_transformers_are_refused(config: RunConfig, tmp_path: Path) -> None:
    half = msgspec.structs.replace(config, recipe=msgspec.structs.replace(config.recipe, precision="bf16"))
    with pytest.raises(UsageError, match="computed in fp32, not in bf16"):
        run_distillation(half, tmp_path / "run", resume=False)
    transformer = saved(tmp_path / "transformer", "test_vit", image_size=160)
    with pytest.raises(UsageError, match="is a transformer, which the exporter quantises as it runs"):
        run_distillation(msgspec.structs.replace(config, student=str(transformer)), tmp_path / "run", resume=False)
