"""What the student of a run answers about sample images, before and after the run's end."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from support import save_tiny_teacher, wait_until

from clip_rd_edge.distillation.checkpoint import list_checkpoints, read_weights
from clip_rd_edge.distillation.config import RunConfig, load_recipe
from clip_rd_edge.distillation.monitoring import answers as module
from clip_rd_edge.distillation.monitoring.answers import StudentAnswers
from clip_rd_edge.distillation.run import run_distillation
from clip_rd_edge.models.load import load_clip
from clip_rd_edge.utils.files import write_text
from clip_rd_edge.utils.structs import to_yaml


@pytest.fixture
def config(pairs_csv: Path) -> RunConfig:
    recipe = msgspec.structs.replace(load_recipe("clip"), steps=4, batch_size=6, precision="fp32", ema_decay=0.5)
    return RunConfig(
        recipe_name="clip", recipe=recipe, data=str(pairs_csv), student="test_vit", image_size=160, text="64x1",
        context_length=12, checkpoint_every=2, log_every=1, workers=0,
    )  # fmt: skip


@pytest.fixture
def run(config: RunConfig, tmp_path: Path) -> Path:
    run_distillation(config, tmp_path / "run", resume=False)
    return tmp_path / "run"


@pytest.fixture
def unfinished(run: Path) -> Path:
    """The run, as if it were not finished yet."""
    (run / "student").rename(run / "finished")
    return run


def listing(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_newest_checkpoint_answers_as_the_student_that_it_becomes(unfinished: Path) -> None:
    files = listing(unfinished)
    before = StudentAnswers(unfinished).compute()
    assert listing(unfinished) == files
    assert (before.step, len(before.samples), before.problem) == (4, 12, "")
    assert before.among == "among the captions of these 12 training pairs"
    assert len({sample.truth for sample in before.samples}) == 12
    (unfinished / "finished").rename(unfinished / "student")
    after = StudentAnswers(unfinished).compute()
    assert after.step is None
    for one, other in zip(before.samples, after.samples, strict=True):
        assert (one.truth, one.answer, one.png) == (other.truth, other.answer, other.png)
        assert one.probability == pytest.approx(other.probability, abs=1e-5)


def test_the_weights_of_a_checkpoint_are_the_moving_average(run: Path) -> None:
    saved = load_clip(str(run)).model.state_dict()
    weights = read_weights(list_checkpoints(run)[-1])
    assert weights.keys() == saved.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, saved[name])


def test_answers_are_computed_in_the_background_and_again_for_a_newer_checkpoint(
    unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = list_checkpoints(unfinished)[-1]
    newest.rename(unfinished / "later")
    answers = StudentAnswers(unfinished)
    assert answers() == module.Answers()  # at once, while they are computed
    assert wait_for(answers, step=2).samples
    (unfinished / "later").rename(newest)
    assert wait_for(answers, step=4).samples
    calls: list[Path] = []
    monkeypatch.setattr(StudentAnswers, "_update", lambda self, source: calls.append(source))
    answers()
    assert calls == []


def test_a_run_that_is_begun_again_in_the_same_folder_is_another_one(
    unfinished: Path, tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_choose_samples", lambda config, task: config.seed)
    monkeypatch.setattr(
        StudentAnswers,
        "_answer",
        lambda self, config, samples, source: module.Answers(
            step=4, among=f"samples of {samples}, weights of {(source / 'state.pt').read_text()}"
        ),
    )
    answers = StudentAnswers(unfinished)

    def begin_again(seed: int, *, at_step: int) -> None:
        shutil.rmtree(unfinished / "checkpoints")
        write_text(unfinished / "config.yaml", to_yaml(msgspec.structs.replace(config, seed=seed)))
        assert wait_until(lambda: answers() == module.Answers())  # there is no student of this run yet
        (unfinished / "checkpoints" / f"step-{at_step:08d}").mkdir(parents=True)
        write_text(unfinished / "checkpoints" / f"step-{at_step:08d}" / "state.pt", f"run {seed}")

    for seed, step in ((1, 4), (2, 4), (3, 6)):
        begin_again(seed, at_step=step)
        assert wait_until(lambda: answers().step == 4)
        assert answers().among == f"samples of {seed}, weights of run {seed}"
    newest = list_checkpoints(unfinished)[-1]
    write_text(newest / "state.pt", "other weights")
    assert wait_until(lambda: answers().among == "samples of 3, weights of other weights")


def wait_for(answers: StudentAnswers, *, step: int) -> module.Answers:
    assert wait_until(lambda: answers().step == step)
    return answers()


def test_the_runs_own_task_is_asked_about_before_its_pairs(
    unfinished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for label, colour in (("red", "red"), ("green", "lime"), ("blue", "blue"), ("black", "black")):
        (tmp_path / "task" / label).mkdir(parents=True)
        Image.new("RGB", (40, 40), colour).save(tmp_path / "task" / label / "a.png")
    shutil.rmtree(tmp_path / "task" / "black")
    answers = StudentAnswers(unfinished, task=str(tmp_path / "task")).compute()
    assert sorted(sample.truth for sample in answers.samples) == ["blue", "green", "red"]
    assert answers.among == "among the 3 labels of task"
    monkeypatch.setattr(module, "SAMPLES", 1)
    monkeypatch.setattr(module, "MAX_LABELS", 2)
    answers = StudentAnswers(unfinished, task=str(tmp_path / "task")).compute()
    assert len(answers.samples) == 1
    assert answers.among == "among 2 of the 3 labels of task"


def test_a_table_of_captions_is_a_task_too(unfinished: Path, pairs_csv: Path) -> None:
    answers = StudentAnswers(unfinished, task=str(pairs_csv)).compute()
    assert answers.among == "among the captions of these 12 of pairs"
    assert all(sample.truth.startswith("a ") for sample in answers.samples)


def test_a_run_without_a_student_has_no_answers_yet(unfinished: Path) -> None:
    shutil.rmtree(unfinished / "checkpoints")
    assert StudentAnswers(unfinished).compute() == module.Answers()


def test_what_cannot_be_answered_is_a_sentence(unfinished: Path, config: RunConfig) -> None:
    Path(config.data).unlink()
    problem = StudentAnswers(unfinished).compute().problem
    assert problem.startswith("There are no sample answers: ")
    assert "does not exist" in problem


def test_a_students_architecture_follows_its_teacher(config: RunConfig, tmp_path: Path) -> None:
    save_tiny_teacher(tmp_path / "teacher")
    config = msgspec.structs.replace(
        config, teacher=str(tmp_path / "teacher"), recipe_name="clip-rd", teacher_precision="fp32",
        recipe=msgspec.structs.replace(load_recipe("clip-rd"), steps=2, batch_size=6, precision="fp32"),
    )  # fmt: skip
    run_distillation(config, tmp_path / "run", resume=False)
    shutil.rmtree(tmp_path / "run" / "student")
    answers = StudentAnswers(tmp_path / "run").compute()
    assert (answers.step, answers.problem) == (2, "")
    assert np.isfinite([sample.probability for sample in answers.samples]).all()
