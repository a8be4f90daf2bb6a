from __future__ import annotations

from pathlib import Path

import pytest

from clip_rd_edge.runtime.doctor import _room
from clip_rd_edge.runtime.footprint import Footprint, footprints


def install(site: Path, name: str, *, requires: str = "", files: dict[str, int]) -> None:
    """A package as pip leaves it: its files, and what is said of them."""
    information = site / f"{name}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{requires}\n")
    for file, size in files.items():
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_bytes(b"x" * size)
    (information / "RECORD").write_text("".join(f"{file},,\n" for file in files if "listed" not in file))


def test_a_package_and_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.util import cache_from_source

    monkeypatch.syspath_prepend(tmp_path)
    requires = 'Requires-Dist: Re_Quired>=1; python_version > "3"\nRequires-Dist: torch; extra == "train"\n'
    compiled = Path(cache_from_source("ours/a.py")).as_posix()
    install(tmp_path, "ours", requires=requires, files={"ours/a.py": 10, compiled: 5, "ours/not-listed": 1000})
    install(tmp_path, "re_quired", requires="Requires-Dist: ours\nRequires-Dist: nowhere", files={"lib.so": 70})
    assert footprints("ours") == [
        Footprint(package="re-quired", size_bytes=70, compiled_bytes=0),
        Footprint(package="ours", size_bytes=15, compiled_bytes=5),
    ]


def test_the_sentence_adds_up() -> None:
    sizes = (80, 70, 20, 12, 11, 6, 3)
    packages = [Footprint(package=f"p{size}", size_bytes=size * 10**6, compiled_bytes=10**6) for size in sizes]
    expected = "202 MB without extras: p80 80, p70 70, p20 20, p12 12, p11 11, 2 others 9; 7 of it is compiled Python"
    assert _room(packages).detail == expected
