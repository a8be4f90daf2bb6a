from __future__ import annotations

import contextlib
import gc
import io
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from clip_rd_edge.errors import ConfigError
from clip_rd_edge.utils.arrays import load_array, npy_bytes, npz_bytes, read_npz


def header(shape: str, dtype: str = "<f4") -> bytes:
    """The start of an .npy file of any shape, whatever follows."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def archive(path: Path, content: bytes, *, members: int = 1, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for number in range(members):
            file.writestr(f"a{number}.npy", content)
    return path


def test_arrays_are_read_as_numpy_reads_them(tmp_path: Path) -> None:
    arrays = {
        "names": np.asarray(["naïve", "猫"]),
        "rows": np.arange(6, dtype=np.float16).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6, dtype=np.int8).reshape(2, 3)),
        "empty": np.zeros((0, 4)),
        "scalar": np.asarray(7),
    }
    (tmp_path / "a.npz").write_bytes(npz_bytes(compressed=True, **arrays))
    read = read_npz(tmp_path / "a.npz", max_bytes=1000)
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [("(10000000000,)", "<f4"), ("(1,)", "<U4000000000"[:12]), ("(9223372036854775807, 9223372036854775807)", "<f4"),
     ("(-1,)", "<f4"), ("(0, 99999999999)", "<f4"), ("(1,)", "|O"), ("(1000001,)", "|i1"), ("(1,)", "<U0")],
)  # fmt: skip
def test_an_array_of_any_claimed_size_is_refused_before_memory_is_taken(tmp_path: Path, shape: str, dtype: str) -> None:
    path = archive(tmp_path / "bomb.npz", header(shape, dtype))
    with pytest.raises(ConfigError, match=r"bomb\.npz could not be read"):
        read_npz(path, max_bytes=1_000_000)


def test_a_compression_bomb_is_refused_by_its_size(tmp_path: Path) -> None:
    path = archive(tmp_path / "bomb.npz", header("(3000000,)") + bytes(12_000_000))
    assert path.stat().st_size < 20_000
    with pytest.raises(ConfigError, match="the limit is 1,000,000"):
        read_npz(path, max_bytes=1_000_000)


@pytest.mark.parametrize("more", [-4000, -3, -1, 1, 4000])
def test_an_array_that_is_cut_or_continues_is_refused(tmp_path: Path, more: int) -> None:
    with pytest.raises(ConfigError):
        read_npz(archive(tmp_path / "a.npz", header("(1000,)") + bytes(4000 + more)), max_bytes=10_000)


def test_a_flipped_bit_anywhere_ends_with_arrays_or_one_sentence(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, names=np.asarray(["a", "b"]), rows=np.arange(60.0).reshape(2, 30))
    intact, refused = buffer.getvalue(), 0
    for position in range(0, len(intact), 3):
        content = bytearray(intact)
        content[position] ^= 1 << position % 8
        (tmp_path / "flipped.npz").write_bytes(content)
        try:
            read_npz(tmp_path / "flipped.npz", max_bytes=10_000)
        except ConfigError as error:
            assert "\n" not in str(error)  # noqa: PT017
            refused += 1
    assert refused > len(intact) / 3 * 0.6  # some bits, such as those of a date, mean nothing


class Garbage:
    """Is freed by the collector alone, wherever that runs, and lets another thread run then."""

    def __init__(self) -> None:
        self.cycle = self

    def __del__(self) -> None:
        time.sleep(0)


def test_any_number_of_threads_may_read_headers_at_once(tmp_path: Path) -> None:
    """Python 3.11 ends a thread with SystemError where another one runs in the middle of its ast.parse."""
    np.save(tmp_path / "a.npy", np.arange(3))
    np.savez(tmp_path / "a.npz", a=np.arange(3))

    def read_often() -> None:
        for _ in range(50):
            Garbage()
            assert load_array(tmp_path / "a.npy", memory_mapped=True).tolist() == [0, 1, 2]
            assert read_npz(tmp_path / "a.npz", max_bytes=100)["a"].tolist() == [0, 1, 2]

    thresholds = gc.get_threshold()
    gc.set_threshold(5)
    try:
        with ThreadPoolExecutor(8) as threads:
            for reader in [threads.submit(read_often) for _ in range(8)]:
                reader.result()
    finally:
        gc.set_threshold(*thresholds)


def test_a_damaged_header_is_a_damaged_file(tmp_path: Path) -> None:
    """NumPy evaluates it, and ends with whatever that raises, such as a TokenError."""
    content, path = npy_bytes(np.zeros((5, 3), np.float32)), tmp_path / "rows.npy"
    for bit in range(8 * 128):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with contextlib.suppress(OSError, ValueError, EOFError):
            load_array(path)
