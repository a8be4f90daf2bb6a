"""Random damage to files of every kind: each ends with an answer or a sentence, and what broke is kept in the corpus.

HYPOTHESIS_PROFILE=long pytest tests/hostile/test_fuzz.py takes an hour or so; the usual profile takes seconds.
"""

from __future__ import annotations

import io
import json
import lzma
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from readers import TEXTS, answer_or_sentence, readers

from benchmarks.robustness.hostile_input import CORPUS

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import strategies as st  # noqa: E402

SUITE = "benchmarks/suites/quickstart.yaml"
SUFFIXES = {
    "images": ("png", "jpg", "gif", "tif", "webp", "bmp", "ppm"),
    "shards": ("tar",),
    "tables": ("csv", "tsv"),
    "labels": ("csv", "tsv", "json", "yaml", "txt"),
    "configs": ("yaml",),
    "manifests": ("json",),
    "banks": ("npz",),
    "tokenizers": ("json",),
    "towers": ("onnx",),
    "indexes": ("json",),
}
# What means something in one of the formats, to be put anywhere.
TOKENS = [
    b"\0", b"\xff", b"\x80", b"\xed\xa0\x80", b"\xef\xbb\xbf", b'"', b"'", b",", b"\t", b"\r\n", b"\n", b"{", b"}",
    b"[", b"]", b"]]]]", b"[[[[", b":", b": ", b"- ", b"&a ", b"*a", b"<<: *a", b"!!int ", b"!!float ", b"!!bool ",
    b"!!timestamp ", b"!!binary ", b"!!set ", b"? ", b"| ", b"> ", b"%YAML ", b"---\n", b"-1", b"1e999", b"NaN",
    b"-Infinity", b"9" * 30, b"0x", b"null", b"true", b"\\ud800", b"\\u0000", b"../", b"filepath,title\n", b"label\n",
    b"names: ", b"PK\x03\x04", b"\x93NUMPY", b"(1,)", b"'<U1'", b"'|O'", b"ustar\0", b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\xff",
]  # fmt: skip


def good_files(bundle: Path) -> dict[str, list[bytes]]:
    """Return valid files of each kind, to be damaged."""
    from PIL import Image

    from clip_rd_edge.distillation.config import RECIPES
    from clip_rd_edge.utils.paths import shipped_path

    def picture(image_format: str) -> bytes:
        buffer = io.BytesIO()
        pixels = np.random.default_rng(0).integers(0, 256, (12, 17, 3), np.uint8)
        Image.fromarray(pixels).save(buffer, image_format)
        return buffer.getvalue()

    def archive(tar_format: int) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
            captions = b'{"caption": ["a", "b"]}'
            for number in range(3):
                for suffix, content in (("png", picture("PNG")), ("txt", b"a dog"), ("json", captions)):
                    info = tarfile.TarInfo(f"{'long/' * 20 * number}{number}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        return buffer.getvalue()

    def arrays(**content: Any) -> bytes:
        buffer = io.BytesIO()
        np.savez(buffer, **content)
        return buffer.getvalue()

    names = np.asarray(["red", "green"])
    index = {"folder": "/a", "bundle": "/b", "model": "m", "embeddings": "embeddings-0.npy", "crc32s": [1104414842]}
    return {
        "images": [picture(name) for name in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM")],
        "shards": [archive(tarfile.GNU_FORMAT), archive(tarfile.PAX_FORMAT), archive(tarfile.USTAR_FORMAT)],
        "tables": [b'filepath,title\na.png,"a ""red"" dog"\nb.png,a cat\n', b"filepath\ttitle\na.png\tb\n"],
        "labels": [
            b"label,n\nred,1\ngreen,2\n",
            b'{"0": "red", "1": "green"}',
            b"names:\n  0: red\n  1: green\n",
            b"red\n",
        ],
        "configs": [
            (RECIPES / "clip-rd.yaml").read_bytes(),
            shipped_path("benchmarks/suites/quickstart.yaml").read_bytes(),
        ],
        "manifests": [(bundle / "manifest.json").read_bytes()],
        "banks": [
            arrays(names=names, embeddings=np.eye(2, 3, dtype=np.float32)),
            arrays(names=names, levels=np.eye(2, 3, dtype=np.int8), scales=np.ones((2, 1), np.float32)),
        ],
        "tokenizers": [(bundle / "tokenizer.json").read_bytes()],
        "towers": [(bundle / "image.onnx").read_bytes()],
        "indexes": [json.dumps({**index, "entries": [["a.png", 1, 1, 1, "x"], ["b.png", 1, 1, 1, "y"]]}).encode()],
    }


def small_corpus(kind: str) -> Iterator[bytes]:
    for path in sorted((CORPUS / kind).iterdir()):
        content = path.read_bytes()
        if path.suffix != ".xz" and len(content) < 20_000:
            yield content


@st.composite
def damaged(draw: Callable[..., Any], contents: list[bytes]) -> bytes:
    """Draw one of the contents after a few changes: bytes replaced, removed, repeated, or put in."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 40)))
        change = draw(st.sampled_from(("replace", "remove", "repeat", "token", "cut")))
        if change == "replace":
            content[start:end] = draw(st.binary(min_size=0, max_size=end - start))
        elif change == "remove":
            del content[start:end]
        elif change == "repeat":
            content[start:start] = content[start:end] * draw(st.integers(1, 50))
        elif change == "token":
            content[start:start] = draw(st.sampled_from(TOKENS))
        else:
            del content[start:]
    return bytes(content)


def keep(kind: str, suffix: str, content: bytes) -> Path:
    """Put what broke something into the corpus; Hypothesis ends with the smallest input that does."""
    packed = len(content) > 20_000
    path = CORPUS / kind / f"found.{suffix}{'.xz' if packed else ''}"
    path.write_bytes(lzma.compress(content) if packed else content)
    return path


def check_file(kind: str, suffix: str, content: bytes, read: Callable[[Path], Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"input.{suffix}")
        path.write_bytes(content)
        try:
            answer_or_sentence(lambda: read(path))
        except BaseException:
            keep(kind, suffix, content)
            raise


@pytest.mark.parametrize("kind", SUFFIXES)
def test_a_damaged_file_gets_an_answer_or_a_sentence(kind: str, colour_bundle: Path) -> None:
    read = readers(colour_bundle)[kind]
    contents = [*good_files(colour_bundle)[kind], *small_corpus(kind)]

    @hypothesis.given(damaged(contents), st.sampled_from(SUFFIXES[kind]))
    def check(content: bytes, suffix: str) -> None:
        check_file(kind, suffix, content, read)

    check()


@pytest.mark.parametrize("header", [1, 2])
def test_any_header_of_an_array_gets_an_answer_or_a_sentence(header: int, colour_bundle: Path) -> None:
    read = readers(colour_bundle)["banks"]
    words = [
        "{", "}", "(", ")", ",", ":", "'descr'", "'fortran_order'", "'shape'", "'<f4'", "'<U3'", "True", "2", "3", "[",
        "]", "-", "0", "1L", "'''", "\n", "'|V0'", "10**9", "'<M8[s]'", "None", "99999999999", "\\", "#",
    ]  # fmt: skip

    @hypothesis.given(st.lists(st.sampled_from(words), max_size=30), st.binary(max_size=64))
    def check(parts: list[str], content: bytes) -> None:
        text = "".join(parts).encode()
        size = len(text).to_bytes(2 if header == 1 else 4, "little")
        array = b"\x93NUMPY" + bytes((header, 0)) + size + text + content
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name in ("names", "embeddings"):
                archive.writestr(f"{name}.npy", array)
        check_file("banks", "npz", buffer.getvalue(), read)

    check()


def test_any_text_gets_an_embedding_or_a_sentence(colour_bundle: Path, fp32_bundle: Path) -> None:
    """Texts of users, and labels: also those that are no Unicode, as names of files can be."""
    from clip_rd_edge.runtime.classifier import ZeroShotClassifier
    from clip_rd_edge.runtime.load import load

    encoders = [load(colour_bundle, threads=1), load(fp32_bundle, threads=1)]
    characters = st.characters() | st.characters(categories=["Cs", "Mn", "Cf", "Zs", "Nd"])

    @hypothesis.given(st.text(characters, max_size=200) | st.sampled_from(TEXTS))
    def check(text: str) -> None:
        for encoder in encoders:
            answer_or_sentence(partial(encoder.encode_texts, [text]))
            answer_or_sentence(partial(ZeroShotClassifier, encoder, [text, "red"]))

    check()
