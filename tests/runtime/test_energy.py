from __future__ import annotations

from pathlib import Path

import pytest

from clip_rd_edge.runtime.energy import EnergyMeter


def counter(folder: Path, name: str, microjoules: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text("999999\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


def test_packages_count_and_begin_again_at_zero(tmp_path: Path) -> None:
    first, second = counter(tmp_path / "rapl:0", "package-0", 900_000), counter(tmp_path / "rapl:1", "package-1", 0)
    counter(tmp_path / "rapl:0:0", "core", 0)  # a part of package 0
    meter = EnergyMeter(tmp_path)
    assert meter
    first.write_text("150000")
    second.write_text("500000")
    assert meter.joules() == pytest.approx(0.75)
    assert meter.joules() == 0


def test_a_machine_that_does_not_tell(tmp_path: Path) -> None:
    assert not EnergyMeter(tmp_path)
