"""Which student a build takes: the best within the limits, measured here or on the device."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from clip_rd_edge.building import plan as student
from clip_rd_edge.building.plan import DEFAULT, STUDENTS, choose_student, is_here, measured_tower, steps_of
from clip_rd_edge.distillation.speed import Speed
from clip_rd_edge.errors import InputError
from clip_rd_edge.settings.measuring import Build

FLOAT_MB = dict(zip(STUDENTS, (16.0, 12.0, 44.0, 8.0, 20.0), strict=True))
HERE_MS = dict(zip(STUDENTS, (9.0, 7.0, 20.0, 3.0, 5.0), strict=True))


@pytest.fixture(autouse=True)
def _measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student, "measured_tower", lambda name, size: (FLOAT_MB[name], HERE_MS[name]))


def chosen(**limits: float | str | Path) -> str:
    return choose_student(Build("photos", "out", **{"target": "cpu-x86", **limits}), image_size=64)  # type: ignore[arg-type]


def test_the_best_student_within_the_limits_is_taken() -> None:
    assert chosen() == DEFAULT
    assert chosen(max_latency=10) == DEFAULT
    assert chosen(max_latency=8) == "mobilenetv4_conv_small"
    assert chosen(max_latency=8, max_size=2.5) == "mobilenetv3_small"  # in INT8
    assert chosen(student="resnet18", max_latency=1) == "resnet18"


@pytest.mark.parametrize(
    ("images", "name", "hours", "steps"),
    [(52, DEFAULT, 8, 163), (320, DEFAULT, 8, 400), (3200, DEFAULT, 8, 4000), (3200, "mobilevit_xxs", 8, 8800),
     (3200, DEFAULT, 0.1, 306)],
)  # fmt: skip
def test_the_steps_follow_from_the_images_the_student_and_the_hours(
    images: int, name: str, hours: float, steps: int
) -> None:
    plan = SimpleNamespace(student=name, batch_size=32)
    request = Build("photos", "out", target="cpu-x86", hours=hours)
    found = SimpleNamespace(of=lambda part: range(images))
    assert steps_of(request, plan, found, Speed(1.0, 0.0))[0] == steps  # type: ignore[arg-type]


def test_limits_that_no_student_meets_are_refused() -> None:
    with pytest.raises(InputError) as refused:
        chosen(max_latency=1)
    assert refused.value.option == "max_latency"


def test_a_device_that_is_not_here_is_judged_by_its_own_results(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(label: str, latency: float) -> SimpleNamespace:
        return SimpleNamespace(label=label, latency=SimpleNamespace(image=SimpleNamespace(p50=latency)))

    rows = [row("Exported resnet18", 4.0), row(DEFAULT, 40.0)]
    monkeypatch.setattr(student, "read_results", lambda path: SimpleNamespace(rows=rows))
    assert chosen(target="cpu-arm", max_latency=5, measured="pi.json") == "resnet18"
    rows[:] = [row("Teacher", 4.0)]
    with pytest.raises(InputError) as refused:
        chosen(target="cpu-arm", max_latency=5, measured="pi.json")
    assert refused.value.option == "max_latency"


def test_the_processor_of_this_machine_is_told_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert [is_here(target) for target in ("cpu-arm", "cpu-x86", "cpu-x86-vnni", "jetson-orin")] == [
        True, False, False, False,
    ]  # fmt: skip


def test_a_tower_is_measured_as_it_is_exported() -> None:
    megabytes, milliseconds = measured_tower("test_resnet", 48)
    assert 0 < megabytes < 5
    assert 0 < milliseconds < 1_000
