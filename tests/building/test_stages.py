"""A build of a tiny student from three kinds of data: its stages are kept, and what cannot be built is refused."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import save_tiny_teacher

import clip_rd_edge as edge
from clip_rd_edge.building.plan import PLAN, Plan
from clip_rd_edge.building.stages import doubtful_labels
from clip_rd_edge.data.tasks import ZeroShotTask
from clip_rd_edge.errors import ConfigError, InputError, InterruptedRunError, UsageError
from clip_rd_edge.utils.structs import read_yaml
from clip_rd_edge.utils.timing import time_in_turn

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 210), "grey": (120, 120, 120)}


def save_images(folder: Path, count: int = 9) -> Path:
    """Write images of four classes, with texture that makes no two of them alike."""
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            texture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((48, 48))
            Image.blend(Image.new("RGB", (48, 48), colour), texture, 0.3).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_images(folder / "images")
    save_tiny_teacher(folder / "teacher")
    return folder


def build(world: Path, output: Path, **changed: Any) -> edge.BuiltBundle:
    options = {
        "data": world / "images", "teacher": world / "teacher", "student": "test_resnet", "image_size": 48, "steps": 3,
        "target": "cpu-x86", "workers": 0, **changed,
    }  # fmt: skip
    return edge.build(output=output, **options)


@pytest.fixture(scope="module", autouse=True)
def _without_what_takes_long() -> Iterator[None]:
    """Leave out the 22,000 nouns that tokens are chosen by, the plots of the runs, and most rounds of timing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clip_rd_edge.building.stages.class_nouns", lambda: ["a cat", "a dog"])
        few = partial(time_in_turn, rounds=2, warmup=0)
        patch.setattr("clip_rd_edge.benchmarking.latency.time_in_turn", lambda calls, **_: few(calls))
        for module in ("run", "loop"):
            patch.setattr(f"clip_rd_edge.distillation.{module}.plot_run", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def built(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("built") / "out"
    build(world, output)
    return output


def state(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_build_goes_from_images_to_a_bundle_with_a_verdict_on_images_that_it_was_not_trained_on(built: Path) -> None:
    with (built / "train.csv").open(newline="") as file:
        trained = {Path(row["filepath"]).read_bytes() for row in csv.DictReader(file)}
    held = [path.read_bytes() for path in (built / "held-out").rglob("*.png")]
    assert len(trained) + len(held) == 36
    assert trained.isdisjoint(held)
    assert len({path.parent.name for path in (built / "held-out" / "test").rglob("*.png")}) > 1
    (score,) = edge.evaluate(built / "bundles" / "cpu-x86", built / "held-out")
    assert score.classes == 4
    assert edge.load(built / "bundles" / "cpu-x86").classify(next((built / "held-out").rglob("*.png")))
    assert (built / "report" / "report.html").is_file()
    assert (built / "look.html").is_file()
    assert "Bundle cpu-x86" in (built / "verdict.md").read_text()
    assert read_yaml(built / PLAN, Plan).steps == 3


def test_the_same_call_does_nothing_and_another_target_trains_nothing_again(world: Path, built: Path) -> None:
    before = state(built)
    assert build(world, built).folder == built / "bundles" / "cpu-x86"
    assert state(built) == before
    build(world, built, target="cpu-arm")
    after = state(built)
    assert {path for path in before if "run" in path.parts or "store" in path.parts} <= {
        path for path in before if after.get(path) == before[path]
    }
    assert (built / "bundles" / "cpu-arm" / "manifest.json").is_file()


@pytest.mark.slow
def test_a_build_that_was_killed_in_each_stage_ends_as_if_it_was_not(
    world: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clip_rd_edge.building import stages

    def killed(*arguments: object, **options: object) -> None:
        raise MemoryError("like a kill, this saves nothing")

    later = ("predict", "trim_text_tower", "run_distillation", "export_model", "verify_bundle", "write_report")
    for name in ("write_task", *later):
        where = stages.look.__globals__ if name == "write_task" else vars(stages)
        with monkeypatch.context() as patch:
            patch.setitem(where, name, killed)
            with pytest.raises(MemoryError):
                build(world, tmp_path / "out")
    build(world, tmp_path / "out")
    weights = "run/student/open_clip_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (built / weights).read_bytes()


def test_another_training_is_refused_where_one_is_kept(world: Path, built: Path) -> None:
    before = state(built)
    shutil.copytree(world / "images", more := world / "more", dirs_exist_ok=True)
    shutil.copy(more / "red" / "1.png", more / "red" / "new.png")
    for changed in ({"steps": 5}, {"hold_out": 0.4}, {"data": more}):
        with pytest.raises(UsageError) as refused:
            build(world, built, **changed)
        assert refused.value.option == "output"
    assert state(built) == before


def test_what_was_made_before_a_plan_is_not_used_for_another_teacher(world: Path, tmp_path: Path) -> None:
    from clip_rd_edge.building import stages

    save_tiny_teacher(tmp_path / "other", seed=2)
    trimmed = []
    for teacher in (world / "teacher", tmp_path / "other"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stages, "steps_of", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(InterruptedRunError):
                build(world, tmp_path / "out", teacher=teacher)
        trimmed.append((tmp_path / "out" / "trimmed" / "open_clip_model.safetensors").read_bytes())
    assert trimmed[0] != trimmed[1]


def test_labels_that_the_teacher_is_sure_are_wrong_are_named_surest_first() -> None:
    images = Path("a.png"), Path("b.png"), Path("c.png"), Path("d.png")
    task = ZeroShotTask(name="", images=images, targets=(0, 0, 1, 1), labels=("cat", "dog"))
    doubtful = doubtful_labels(task, predicted=(1, 1, 0, 1), probabilities=(0.95, 0.99, 0.6, 1.0))
    assert doubtful == ("b.png in cat may be dog", "a.png in cat may be dog")


def test_an_output_among_the_classes_is_refused(world: Path) -> None:
    with pytest.raises(UsageError) as refused:
        build(world, world / "images" / "out")
    assert refused.value.option == "output"
    assert not (world / "images" / "out").exists()


def test_a_plan_names_nothing_to_open(world: Path, built: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "out")
    plan = tmp_path / "out" / PLAN
    plan.write_text(plan.read_text().replace("recipe: clip-kd-bank", "recipe: /tmp/mine.yaml"))
    with pytest.raises(ConfigError):
        build(world, tmp_path / "out")


@pytest.mark.parametrize(
    ("changed", "option"),
    [
        ({"target": "cpu-arm", "max_latency": 5}, "max_latency"),
        ({"target": "browser"}, "target"),
        ({"labels": ["red"]}, "labels"),
        ({"data": "flat"}, "labels"),
        ({"data": "pairs.csv", "labels": ["red", "green"]}, "labels"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is_written(
    world: Path, tmp_path: Path, changed: dict[str, Any], option: str
) -> None:
    shutil.copytree(world / "images" / "red", tmp_path / "flat")
    (tmp_path / "pairs.csv").write_text("filepath,title\nflat/0.png,red\nflat/1.png,red too\n")
    if "data" in changed:
        changed = {**changed, "data": tmp_path / changed["data"]}
    with pytest.raises((UsageError, InputError)) as refused:
        build(world, tmp_path / "out", **changed)
    assert refused.value.option == option
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_captions_of_their_own_are_held_out_as_retrieval(world: Path, tmp_path: Path) -> None:
    rows = [(path, f"{path.parent.name} thing {path.stem}") for path in sorted((world / "images").rglob("*.png"))]
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("filepath", "title"), *rows])
    built = build(world, tmp_path / "out", data=tmp_path / "pairs.csv")
    (score,) = edge.evaluate(built, built.held_out)
    assert score.captions == score.images > 3
    assert built.verdict


@pytest.mark.slow
def test_images_without_captions_are_compared_by_the_teachers_answers(world: Path, tmp_path: Path) -> None:
    built = build(world, tmp_path / "out", data=world / "images", labels=list(COLOURS))
    (teacher,) = edge.evaluate(world / "teacher", built.held_out)
    assert teacher.top1 == 1.0
    assert not [path for path in (tmp_path / "out").rglob("*.csv") if "red" in path.read_text().splitlines()[0]]
