from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_rd_edge.benchmarking.answer_cache import AnswerCache, DamagedCacheError
from clip_rd_edge.benchmarking.results import this_environment
from clip_rd_edge.benchmarking.run import run_suite
from clip_rd_edge.benchmarking.suite import Suite

Open = Callable[[str], Any]


@pytest.fixture
def cache(tmp_path: Path) -> AnswerCache:
    return AnswerCache(tmp_path / "parts", this_environment())


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


def test_an_interrupted_run_resumes_after_the_last_model(suite: Suite, open_fake: Open, cache: AnswerCache) -> None:
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


def test_a_changed_model_is_measured_again(suite: Suite, open_fake: Open, cache: AnswerCache) -> None:
    run_suite(suite, open_fake, cache=cache)
    (Path(suite.root or "") / "student" / "weights").write_bytes(b"new")
    evaluated: list[str] = []
    run_suite(suite, record_evaluations(open_fake, evaluated), cache=cache)
    assert evaluated == ["student"]


def test_a_damaged_cache_file_is_named(suite: Suite, open_fake: Open, cache: AnswerCache) -> None:
    run_suite(suite, open_fake, cache=cache)
    path = sorted(cache.folder.iterdir())[0]
    path.write_text("{")
    with pytest.raises(DamagedCacheError, match=r"is not valid JSON") as caught:
        run_suite(suite, open_fake, cache=cache)
    assert caught.value.hint.startswith(f"remove {path}")
