from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_rd_edge.benchmarking.answer_cache import DamagedPartError, Parts
from clip_rd_edge.benchmarking.results import this_environment
from clip_rd_edge.benchmarking.run import run_suite
from clip_rd_edge.benchmarking.suite import Suite

Open = Callable[[str], Any]


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return Parts(tmp_path / "parts", this_environment())


def asked(open_fake: Open, seen: list[str]) -> Open:
    """Notes which model is asked to embed pictures of a task."""

    def opening(spec: str) -> Any:
        encoder = open_fake(spec)
        plain = encoder.encode_images

        def encode(images: Any) -> Any:
            if len(images) > 1:  # latency takes one at a time
                seen.append(encoder.name)
            return plain(images)

        encoder.encode_images = encode
        return encoder

    return opening


def test_an_interrupted_run_goes_on_after_the_last_model(suite: Suite, open_fake: Open, parts: Parts) -> None:
    def interrupted(spec: str) -> Any:
        if spec.endswith("fp32"):
            raise KeyboardInterrupt
        return open_fake(spec)

    with pytest.raises(KeyboardInterrupt):
        run_suite(suite, interrupted, parts=parts)
    seen: list[str] = []
    found = run_suite(suite, asked(open_fake, seen), parts=parts)
    assert seen == ["fp32", "int8"]
    whole = run_suite(suite, open_fake)
    assert [row.scores for row in found.rows] == [row.scores for row in whole.rows]
    assert found.comparisons == whole.comparisons
    parts.remove()
    assert not parts.folder.exists()


def test_a_model_that_has_changed_is_measured_again(suite: Suite, open_fake: Open, parts: Parts) -> None:
    run_suite(suite, open_fake, parts=parts)
    (Path(suite.root or "") / "student" / "weights").write_bytes(b"new")
    seen: list[str] = []
    run_suite(suite, asked(open_fake, seen), parts=parts)
    assert seen == ["student"]


def test_a_damaged_part_is_named(suite: Suite, open_fake: Open, parts: Parts) -> None:
    run_suite(suite, open_fake, parts=parts)
    path = sorted(parts.folder.iterdir())[0]
    path.write_text("{")
    with pytest.raises(DamagedPartError, match=r"is not valid JSON") as caught:
        run_suite(suite, open_fake, parts=parts)
    assert caught.value.hint.startswith(f"remove {path}")
