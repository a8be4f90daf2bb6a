from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image

from clip_rd_edge.benchmarking.accuracy import RetrievalPredictions
from clip_rd_edge.benchmarking.metrics import Recall, RetrievalScore
from clip_rd_edge.benchmarking.results import this_environment
from clip_rd_edge.benchmarking.run import DamagedCacheError, PredictionCache, is_cache, run_suite, task_state
from clip_rd_edge.benchmarking.suite import Suite
from clip_rd_edge.data.shard_index import TarMember
from clip_rd_edge.data.tasks import RetrievalTask, load_task

Open = Callable[[str], Any]


@pytest.fixture
def cache(tmp_path: Path) -> PredictionCache:
    return PredictionCache(tmp_path / "parts", this_environment())


def test_answers_of_another_machine_are_not_taken(tmp_path: Path) -> None:
    task = RetrievalTask(name="t", images=(tmp_path / "a.png",), captions=("a",), caption_images=(0,))
    score = RetrievalScore(
        task="t", images=1, captions=1, image_to_text=Recall(at1=1, at5=None, at10=None),
        text_to_image=Recall(at1=1, at5=None, at10=None),
    )  # fmt: skip
    here = this_environment()
    PredictionCache(tmp_path, here).store("m", None, task, RetrievalPredictions(score=score, correctness=()))
    assert PredictionCache(tmp_path, here).find("m", None, task) is not None
    for change in ({"machine": "Abacus, 2 cores"}, {"instruction_sets": ()}, {"accelerator": "NVIDIA L4"}):
        assert PredictionCache(tmp_path, msgspec.structs.replace(here, **change)).find("m", None, task) is None


def record_evaluations(open_fake: Open, evaluated: list[str]) -> Open:
    """Wrap `open_fake` to record which models embed the images of a task."""

    def open_recorded(spec: str) -> Any:
        encoder = open_fake(spec)
        plain = encoder.encode_images

        def encode(images: Any) -> Any:
            if len(images) > 1:  # latency is measured at batch 1
                evaluated.append(encoder.name)
            return plain(images)

        encoder.encode_images = encode
        return encoder

    return open_recorded


def test_an_interrupted_run_resumes_after_the_last_model(suite: Suite, open_fake: Open, cache: PredictionCache) -> None:
    def interrupted(spec: str) -> Any:
        if spec.endswith("fp32"):
            raise KeyboardInterrupt
        return open_fake(spec)

    with pytest.raises(KeyboardInterrupt):
        run_suite(suite, interrupted, cache=cache)
    evaluated: list[str] = []
    resumed = run_suite(suite, record_evaluations(open_fake, evaluated), cache=cache)
    assert evaluated == ["fp32", "int8"]
    uninterrupted = run_suite(suite, open_fake)
    assert [row.scores for row in resumed.rows] == [row.scores for row in uninterrupted.rows]
    assert resumed.comparisons == uninterrupted.comparisons
    cache.remove()
    assert not cache.folder.exists()


def test_a_changed_model_is_measured_again(suite: Suite, open_fake: Open, cache: PredictionCache) -> None:
    run_suite(suite, open_fake, cache=cache)
    (Path(suite.root or "") / "student" / "weights").write_bytes(b"new")
    evaluated: list[str] = []
    run_suite(suite, record_evaluations(open_fake, evaluated), cache=cache)
    assert evaluated == ["student"]


def test_a_damaged_cache_file_is_named(suite: Suite, open_fake: Open, cache: PredictionCache) -> None:
    run_suite(suite, open_fake, cache=cache)
    path = sorted(cache.folder.iterdir())[0]
    path.write_text("{")
    with pytest.raises(DamagedCacheError, match=r"is not valid JSON") as caught:
        run_suite(suite, open_fake, cache=cache)
    assert caught.value.hint.startswith(f"remove {path}")


def test_answers_on_images_that_were_replaced_are_measured_again(
    suite: Suite, open_fake: Open, cache: PredictionCache
) -> None:
    run_suite(suite, open_fake, cache=cache)
    image = Path(suite.root or "") / "task" / "red" / "16.png"
    image.write_bytes((image.parents[1] / "blue" / "24.png").read_bytes())
    resumed = run_suite(suite, open_fake, cache=cache)
    assert [row.scores for row in resumed.rows] == [row.scores for row in run_suite(suite, open_fake).rows]


def test_images_in_shards_that_were_replaced_are_measured_again(tmp_path: Path, cache: PredictionCache) -> None:
    shard = tmp_path / "0.tar"
    task = RetrievalTask(name="t", images=(TarMember(shard, "a.png", 0, 3),), captions=("a",), caption_images=(0,))
    answers = RetrievalPredictions(
        score=RetrievalScore(
            task="t", images=1, captions=1, image_to_text=Recall(at1=1, at5=None, at10=None),
            text_to_image=Recall(at1=1, at5=None, at10=None),
        ),
        correctness=(),
    )  # fmt: skip
    shard.write_bytes(b"old")
    cache.store("m", None, task, answers)
    assert cache.find("m", None, task) == answers
    shard.write_bytes(b"newer")
    assert cache.find("m", None, task) is None


def _png(shade: int) -> bytes:
    content = io.BytesIO()
    Image.new("L", (8, 8), shade).save(content, "png")
    return content.getvalue()


def test_a_task_on_a_remote_shard_that_was_replaced_is_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fsspec")
    monkeypatch.setenv("CLIP_RD_EDGE_CACHE", str(tmp_path / "cache"))
    path, states = tmp_path / "0.tar", []
    for shade in (0, 255):
        with tarfile.open(path, "w") as tar:
            for name, content in {"a.png": _png(shade), "a.txt": b"a"}.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        os.utime(path, (shade, shade))
        states.append(task_state(load_task(path.as_uri())))
        assert task_state(load_task(path.as_uri())) == states[-1]
    assert states[0] != states[1]


def test_a_folder_of_that_name_with_other_files_is_no_cache_and_stays(
    suite: Suite, open_fake: Open, cache: PredictionCache
) -> None:
    assert not is_cache(cache.folder)
    run_suite(suite, open_fake, cache=cache)
    assert is_cache(cache.folder)
    (cache.folder / ".DS_Store").touch()  # whoever looked at the folder has not put anything there
    assert is_cache(cache.folder)
    mine = cache.folder / "engine.step"
    mine.write_text("mine")
    assert not is_cache(cache.folder)
    cache.remove()
    assert [path.name for path in cache.folder.iterdir()] == ["engine.step"]
