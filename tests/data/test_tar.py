"""The scan lists what tarfile lists, and nothing after damage; files make samples by the rules of webdataset."""

from __future__ import annotations

import io
import os
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from clip_rd_edge.data.tar import UNREADABLE, TarFile, TarScan, samples_of

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "GNU": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def scan_of(path: Path) -> TarScan:
    return TarScan(partial(os.open, path, os.O_RDONLY))


def write_archive(path: Path, tar_format: int) -> Path:
    """Write a tar with files, folders, links, long and non-ASCII names, and times with fractions."""
    generator = np.random.default_rng(0)
    with tarfile.open(path, "w", format=tar_format) as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        names = ["a.jpg", "folder/a.txt", "f" * 60 + "/" + "n" * 70 + ".jpg", "été.png", "empty.txt", "z" * 100]
        names += [] if tar_format == tarfile.USTAR_FORMAT else ["long/" * 40 + "x.jpg"]
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 0 if name == "empty.txt" else int(generator.integers(1, 2000))
            info.mtime = 1e9 + 0.25 if tar_format == tarfile.PAX_FORMAT else 10**9
            archive.addfile(info, io.BytesIO(bytes([i]) * info.size))
            link = tarfile.TarInfo(f"link-{i}")
            link.type, link.linkname = (tarfile.SYMTYPE, tarfile.LNKTYPE)[i % 2], "a.jpg"
            archive.addfile(link)
    return path


def listed_by_tarfile(path: Path) -> list[TarFile]:
    with tarfile.open(path) as archive:
        members = [member for member in archive if member.isreg()]
    return [(m.name.encode(errors="surrogateescape"), m.offset_data, m.size) for m in members]


@pytest.mark.parametrize("tar_format", FORMATS.values(), ids=FORMATS)
def test_the_scan_lists_the_files_that_tarfile_lists(tmp_path: Path, tar_format: int) -> None:
    path = write_archive(tmp_path / "a.tar", tar_format)
    scan = scan_of(path)
    assert [*scan] == listed_by_tarfile(path)
    assert scan.damage == ""


def test_sizes_beyond_all_numbers_are_those_of_a_file_that_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(plain_file("a.jpg", b"x") + pax_header(b"39 size=%030d\n" % 10**29) + plain_file("a.txt", b"y"))
    scan = scan_of(path)
    assert [name for name, _, _ in scan] == [b"a.jpg"]
    assert "within a.txt" in scan.damage


def pax_header(records: bytes, *, size: int | None = None) -> bytes:
    """An extended header of any content, sound or not."""
    info = tarfile.TarInfo("PaxHeaders/x")
    info.type, info.size = tarfile.XHDTYPE, len(records) if size is None else size
    return info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(-(-len(records) // 512) * 512, b"\0")


def plain_file(name: str, content: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content.ljust(-(-len(content) // 512) * 512, b"\0")


@pytest.mark.parametrize(
    "header",
    [
        pax_header(b"no records"),
        pax_header(b"-5 path=x\n"),
        pax_header(b"99 path=x\n"),
        pax_header(b"11 size=-7\n"),
        pax_header(b"9" * 300 + b" path=x\n"),
        pax_header(b"30 GNU.sparse.map=0,1,2,3,4,5\n"),
        pax_header(bytes(2 << 20)),
    ],
    ids=["words", "negative", "long", "no size", "digits", "sparse", "large"],
)
def test_a_malformed_extended_header_makes_the_next_file_unreadable_and_no_other(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "a.tar"
    before, hit, after = (plain_file(name, name.encode()) for name in ("before.txt", "hit.txt", "after.txt"))
    path.write_bytes(before + header + hit + after + bytes(1024))
    scan = scan_of(path)
    start = len(before) + len(header)
    assert [*scan] == [
        (b"before.txt", 512, 10),
        (b"hit.txt", UNREADABLE, 7),
        (b"after.txt", start + len(hit) + 512, 9),
    ]
    assert scan.damage == ""


def test_an_extended_header_that_runs_past_the_end_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(plain_file("before.txt", b"x") + pax_header(b"", size=1 << 30))
    scan = scan_of(path)
    assert [name for name, _, _ in scan] == [b"before.txt"]
    assert "within an extended header" in scan.damage


@pytest.mark.parametrize("tar_format", FORMATS.values(), ids=FORMATS)
def test_no_damaged_byte_adds_or_moves_a_file(tmp_path: Path, tar_format: int) -> None:
    path = write_archive(tmp_path / "a.tar", tar_format)
    whole, files = path.read_bytes(), [*scan_of(path)]
    contents = {byte for _, offset, size in files for byte in range(offset, offset + -(-size // 512) * 512)}
    generator = np.random.default_rng(1)
    headers = sorted(set(range(len(whole) - 20480 // 2)) - contents)
    for position in generator.choice(headers, 400, replace=False).tolist():
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        scan = scan_of(path)
        found = [*scan]
        # A flipped bit in the content of an extended header has no checksum: it can only change one name, or make the
        # file unreadable.
        if found != files:
            assert scan.damage or len(found) == len(files), position
            assert all(
                file[1] in (UNREADABLE, real[1]) and file[2] == real[2]
                for file, real in zip(found, files, strict=False)
            ), position


@pytest.mark.parametrize("tar_format", FORMATS.values(), ids=FORMATS)
def test_every_cut_is_noticed(tmp_path: Path, tar_format: int) -> None:
    path = write_archive(tmp_path / "a.tar", tar_format)
    whole, files = path.read_bytes(), [*scan_of(path)]
    end = max(offset + size for _, offset, size in files) + 1024
    for length in range(0, end, 256):
        path.write_bytes(whole[:length])
        scan = scan_of(path)
        found = [*scan]
        assert found == files[: len(found)]
        assert len(found) == len(files) or scan.damage, length


# Consecutive files, and after each sample its name and the numbers of its files by column: an image, text, JSON, class.
SAMPLES = [
    (["a.webp", "a.png", "a.jpg", "a.txt", "a.seg.png"], ("a", {0: 2, 1: 3})),  # the image that open_clip takes
    (["a.TXT", "a.cls"], ("a", {1: 5, 3: 6})),  # a suffix again: another sample
    (["__meta__.json", "x/__meta__/0.txt", "x/._a.png", "readme", "y/", ".txt", "0."], None),
    (["x/0.jpeg", "x/0.json", "x/0.jpg2"], ("x/0", {0: 14, 2: 15})),
    (["x.y/0.png", "x.y/0.Txt"], ("x.y/0", {0: 17, 1: 18})),
    (["a__b.png"], ("a__b", {0: 19})),
    (["__b.txt"], ("__b", {1: 20})),
    (["été.foo"], ("été", {})),
]


def test_files_are_grouped_by_webdatasets_rules() -> None:
    files = [
        (name.encode(), 10 * n, 10 * n + 1) for n, name in enumerate(name for names, _ in SAMPLES for name in names)
    ]
    names, locations = samples_of(files)
    expected = [sample for _, sample in SAMPLES if sample]
    assert names.tolist() == [name.encode() for name, _ in expected]
    assert [
        {column: (offset, size) for column, (offset, size) in enumerate(sample) if offset >= 0}
        for sample in locations.tolist()
    ] == [{column: (10 * n, 10 * n + 1) for column, n in numbers.items()} for _, numbers in expected]
