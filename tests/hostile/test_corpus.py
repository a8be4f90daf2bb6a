"""Every file of the corpus, most of which once broke something, is answered, or refused in a sentence."""

from __future__ import annotations

import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from readers import CORPUS, answer_or_sentence, readers

FILES = sorted(path for kind in CORPUS.iterdir() if kind.name != "requests" for path in kind.iterdir())
HUGE = 3 << 30  # bytes of a sparse file
HEADS = {
    "images": ("a.bmp", b"BM"),
    "shards": ("a.tar", b"a.png"),
    "tables": ("a.csv", b"filepath,title\na.png,red\n"),
    "labels": ("a.txt", b"red\n"),
    "configs": ("a.yaml", b"steps: 3\n"),
    "manifests": ("a.json", b'{"format_version": 1}'),
    "indexes": ("a.json", b"{"),
}


def unpacked(path: Path, folder: Path) -> Path:
    """Return a file of the corpus where it may be read; the larger ones are kept compressed."""
    packed = path.suffix == ".xz"
    copy = folder / (path.stem if packed else path.name)
    copy.write_bytes(lzma.decompress(path.read_bytes()) if packed else path.read_bytes())
    return copy


@pytest.mark.parametrize("path", FILES, ids=[f"{path.parent.name}/{path.name}" for path in FILES])
def test_hostile_input_gets_an_answer_or_a_sentence(path: Path, colour_bundle: Path, tmp_path: Path) -> None:
    read: Callable[[Path], object] = readers(colour_bundle)[path.parent.name]
    answer_or_sentence(lambda: read(unpacked(path, tmp_path)))


@pytest.mark.parametrize("kind", HEADS)
def test_a_file_of_any_size_is_refused_before_it_is_read(kind: str, colour_bundle: Path, tmp_path: Path) -> None:
    name, head = HEADS[kind]
    path = tmp_path / name
    path.write_bytes(head)
    os.truncate(path, HUGE)
    answer_or_sentence(lambda: readers(colour_bundle)[kind](path))
