"""Runs on images without captions and captions without images, alone and beside pairs."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support import Watch
from tiny_runs import killed_and_resumed, run_on_images_and_labels, weights

from clip_rd_edge.bundle.runs import read_metrics
from clip_rd_edge.data.order import StepSampler, View
from clip_rd_edge.distillation.config import RunConfig, load_recipe
from clip_rd_edge.distillation.loader import Batch, step_loader
from clip_rd_edge.distillation.processes import Processes
from clip_rd_edge.distillation.run import run_distillation
from clip_rd_edge.distillation.setup import load_setup, make_dataset
from clip_rd_edge.errors import UsageError
from clip_rd_edge.exporting.calibration import kept_pairs
from clip_rd_edge.losses.objective import Weights
from clip_rd_edge.models.load import training_facts
from clip_rd_edge.runtime.labels import read_labels_file, read_texts


@pytest.fixture
def config(pairs_csv: Path, tmp_path: Path) -> RunConfig:
    return run_on_images_and_labels(pairs_csv, tmp_path)


def test_images_and_labels_alone_train_a_student(config: RunConfig, tmp_path: Path) -> None:
    watch = Watch()
    student = run_distillation(config, tmp_path / "run", resume=False, reporter=watch)
    assert "24 images without captions and 4 texts" in watch.noted[0]
    assert "task, icl, vrd_kl, xrd" in " ".join(watch.noted)  # terms that are 0
    record = json.loads((student / "distillation.json").read_text())
    assert (record["pairs"], record["images"], record["texts"], record["data"]) == (0, 24, 4, None)
    assert record["templates"] == ["a {} picture"]  # which an export puts its labels into
    facts = training_facts(str(student))
    assert (facts["images"], facts["image_source"]) == ("24", "pictures")
    lines = read_metrics(tmp_path / "run")
    for line in lines:
        assert [line[f"loss/{term}"] for term in ("task", "icl", "vrd_kl", "xrd")] == [0, 0, 0, 0]
        assert min(line[f"loss/{term}"] for term in ("fd", "hrd", "vrd_ce_image", "vrd_ce_text")) > 0
        assert "student_positive" not in line
    assert lines[-1]["loss/fd"] < lines[0]["loss/fd"]
    plotted = {path.name for path in (tmp_path / "run" / "report").iterdir()}
    assert plotted == {"losses.png"}  # none of the geometry of pairs
    first, last = weights(student), load_file(tmp_path / "teacher" / "open_clip_model.safetensors")
    assert first.keys() == last.keys()


def test_texts_alone_train_the_text_tower_and_nothing_else(config: RunConfig, tmp_path: Path) -> None:
    """A student with its teacher's image tower, and a new text tower."""
    config = msgspec.structs.replace(
        config,
        images=None,
        student="test_resnet",
        image_size=40,
        pretrained_image="teacher",
        recipe=msgspec.structs.replace(config.recipe, batch_size=4, precision="auto"),
        teacher_precision="auto",
    )
    watch = Watch()
    student = run_distillation(config, tmp_path / "run", resume=False, reporter=watch)
    assert "fd, vrd_ce_text" in " ".join(watch.noted)
    assert "precision: auto" not in (tmp_path / "run" / "config.yaml").read_text()  # it is measured once
    lines = read_metrics(tmp_path / "run")
    assert {key for key in lines[0] if key.startswith("loss/")} == {"loss/fd", "loss/vrd_ce_text"}
    assert lines[-1]["loss/fd"] < lines[0]["loss/fd"]
    trained, teacher = weights(student), load_file(tmp_path / "teacher" / "open_clip_model.safetensors")
    kept = [name for name in teacher if name.startswith("visual.")]
    assert kept
    for name in (*kept, "logit_scale"):
        assert torch.equal(trained[name], teacher[name]), name
    record = json.loads((student / "distillation.json").read_text())
    assert (record["pairs"], record["images"], record["texts"]) == (0, 0, 4)


@pytest.mark.parametrize(
    ("weights", "with_pairs", "matches"),
    [
        ({"fd": 1, "vrd_ce_image": 1, "vrd_ce_text": 1, "icl": 1, "xrd": 1}, True, False),
        ({"fd": 1, "task": 1}, False, False),
        ({"fd": 1, "hrd": 1}, False, True),
    ],
)
def test_projections_need_a_term_that_keeps_images_and_texts_together(
    config: RunConfig, pairs_csv: Path, weights: dict[str, float], with_pairs: bool, matches: bool
) -> None:
    recipe = msgspec.structs.replace(config.recipe, objective=Weights(**weights))
    config = msgspec.structs.replace(config, recipe=recipe, data=str(pairs_csv) if with_pairs else None)
    load_setup(config, name="student", processes=Processes())  # as wide as the teacher
    with nullcontext() if matches else pytest.raises(UsageError):
        load_setup(msgspec.structs.replace(config, embedding_size=16), name="student", processes=Processes())


@pytest.mark.parametrize("kind", ["stored", "beside pairs"])
def test_a_killed_run_resumes_to_the_same_weights(
    config: RunConfig, pairs_csv: Path, tmp_path: Path, kind: str
) -> None:
    recipe = msgspec.structs.replace(config.recipe, objective=load_recipe("clip-rd-bank").objective)
    of_kind: dict[str, Any] = (
        {"store": str(tmp_path / "cache"), "views": 2} if kind == "stored" else {"data": str(pairs_csv)}
    )
    killed_and_resumed(msgspec.structs.replace(config, recipe=recipe, **of_kind), tmp_path, after=5)


def batches(config: RunConfig, *, workers: int = 0) -> list[Batch]:
    setup = load_setup(config, name="student", processes=Processes())
    sampler = StepSampler(setup.pairs.groups, 6, seed=0, steps=range(8))
    return list(step_loader(make_dataset(config, setup), sampler, workers=workers))


def test_a_batch_knows_which_of_its_rows_are_pairs(config: RunConfig, pairs_csv: Path, tmp_path: Path) -> None:
    config = msgspec.structs.replace(config, data=str(pairs_csv))
    loaded = batches(config, workers=2)
    rows = [(caption, own) for batch in loaded for caption, own in zip(batch.captions, batch.paired or (), strict=True)]
    assert sum(own for _, own in rows) == 24
    assert all((" number " in caption) == own for caption, own in rows)
    assert all(
        batch.paired is None
        for batch in batches(msgspec.structs.replace(config, images=None, texts=None, templates=()))
    )


def test_a_row_that_takes_the_place_of_a_bad_one_is_what_it_is(config: RunConfig, pairs_csv: Path) -> None:
    """The last pair's image is damaged, and the next row is an image without a caption."""
    folder = pairs_csv.parent / "frames"
    shutil.copytree(pairs_csv.parent / "pictures", folder)
    (pairs_csv.parent / "pictures" / "23.png").write_bytes(b"damaged")
    config = msgspec.structs.replace(config, data=str(pairs_csv), images=str(folder), max_bad=0.1)
    dataset = make_dataset(config, load_setup(config, name="student", processes=Processes()))
    assert (dataset[View(0, 22)].paired, dataset[View(0, 23)].paired, dataset[View(0, 24)].paired) == (
        True,
        False,
        False,
    )
    assert dataset[View(0, 23)].caption == "a red picture"
    assert [index for index, _ in dataset[View(0, 23)].bad] == [23]


def test_int8_is_calibrated_on_the_images_and_labels_of_the_run(config: RunConfig, tmp_path: Path) -> None:
    for number in range(24, 40):
        Image.new("RGB", (48, 40), (number, 0, 0)).save(Path(str(config.images)) / f"{number}.png")
    config = msgspec.structs.replace(config, recipe=msgspec.structs.replace(config.recipe, steps=1))
    student = run_distillation(config, tmp_path / "run", resume=False)
    kept = kept_pairs(str(student))
    assert (len(kept.images), kept.paired) == (40, False)
    assert set(kept.captions) <= {f"a {name} picture" for name in ("red", "green", "blue", "yellow")}


def test_a_caption_may_begin_with_a_hashtag(tmp_path: Path) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("# from the archive\n#\n#sunset over the bay\na boat\n")
    assert read_texts(str(captions), column="title") == ["#sunset over the bay", "a boat"]
    assert read_labels_file(captions) == ["#sunset over the bay", "a boat"]
