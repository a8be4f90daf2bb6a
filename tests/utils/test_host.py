from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from clip_rd_edge.utils import host
from clip_rd_edge.utils.host import BackgroundLoad, cpu_quota, instruction_sets, memory_limit


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (
            "processor\t: 0\nflags\t\t: fpu sse2 avx2 avx512f avx512_vnni amx_int8\nprocessor\t: 1\n",
            ("AVX2", "AVX-512", "AVX-512 VNNI", "AMX INT8"),
        ),
        ("processor\t: 0\nFeatures\t: fp asimd asimddp\n", ("Neon", "Neon dot product")),
        ("hw.optional.avx2_0: 1\nhw.optional.avx512f: 0\n", ("AVX2",)),
    ],
)
def test_instruction_sets_are_those_that_the_system_names(features: str, expected: tuple[str, ...]) -> None:
    assert instruction_sets(features) == expected


@pytest.mark.parametrize(
    ("limit_of", "groups", "files", "limit"),
    [
        (cpu_quota, "0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),  # of a container
        (
            cpu_quota,
            "0::/a.slice/b.service\n",
            {"a.slice/b.service/cpu.max": "max 100000\n", "a.slice/cpu.max": "200000 100000\n"},
            2.0,
        ),
        (
            cpu_quota,
            "1:cpu:/docker/0123\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            None,
        ),
        (memory_limit, "0::/\n", {"memory.max": "1000000\n"}, 1_000_000),
        (memory_limit, "4:memory:/docker/1\n", {"memory/memory.limit_in_bytes": f"{(1 << 63) - 4096}\n"}, None),
    ],
)
def test_limits_are_those_of_the_own_control_group(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit_of: Callable[[], float | None],
    groups: str,
    files: dict[str, str],
    limit: float | None,
) -> None:
    (tmp_path / "own").write_text(groups)
    for name, content in files.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    monkeypatch.setattr(host, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(host, "_CGROUPS", tmp_path / "cgroup")
    assert limit_of() == limit


def test_background_load_excludes_own_work(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = host.os.sysconf("SC_CLK_TCK")
    # Two cores for ten seconds; twelve seconds of work, of which nine are this process's.
    states = iter([(0, 0), (12 * ticks, 20 * ticks)])
    own_seconds = iter([100.0, 109.0])
    monkeypatch.setattr(host, "_cpu_ticks", lambda: next(states))
    monkeypatch.setattr(time, "process_time", lambda: next(own_seconds))
    assert BackgroundLoad().share() == pytest.approx(3 / 20)


@pytest.mark.parametrize(
    ("script", "capability", "gpus"),
    [("echo 8.9; echo 12.0", "8.9", "8.9, 12.0"), ("echo 'NVIDIA-SMI has failed'; exit 9", "", "")],
)
def test_gpus_are_as_the_driver_reports_them(
    script: str, capability: str, gpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (host.cuda_capability(), host.nvidia_gpus()) == ("", "")  # no driver
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert host.cuda_capability() == capability
    assert host.nvidia_gpus() == gpus
