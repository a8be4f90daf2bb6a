"""The browser page's JavaScript matches the Python code: bit-exact pixels, and the same ids for any text.

What needs no browser runs in Node.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from clip_rd_edge.bundle.images import open_image
from clip_rd_edge.bundle.labels import LabelBank, LabelPrecision, read_labels, write_labels
from clip_rd_edge.bundle.preprocess import Preprocessing, preprocess
from clip_rd_edge.bundle.tokenizer import Tokenizer, TokenizerSpec, clean_text
from clip_rd_edge.errors import ClipRdEdgeError
from clip_rd_edge.exporting.layouts.browser import ALONE, PACKAGES, PAGE, _cached

from .conftest import Node, to_base64
from .conftest import image_bytes as encode

SMALL = Preprocessing(size=(8, 8), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
RESIZE = """async ([encoded, width, newWidth, newHeight, interpolation]) => {
    const { resize } = await import("./resample.js");
    const bytes = Uint8Array.from(atob(encoded), (character) => character.charCodeAt(0));
    const rows = (top, count) => bytes.subarray(top * width * 4, (top + count) * width * 4);
    const source = { width, height: bytes.length / width / 4, rows };
    const whole = (size) => ({ size, first: 0, count: size });
    return [...resize(source, whole(newWidth), whole(newHeight), interpolation)];
}"""
PREPROCESS = """async ([encoded, spec, width]) => {
    const { decode, preprocess } = await import("./pixels.js");
    const bytes = Uint8ClampedArray.from(atob(encoded), (character) => character.charCodeAt(0));
    return [...preprocess(await decode(width ? new ImageData(bytes, width) : new Blob([bytes])), spec)];
}"""
READ_BANK = """async (encoded) => {
    const [{ readNpz }, { readBank }] = await Promise.all([import("./npz.js"), import("./model.js")]);
    const arrays = await readNpz(Uint8Array.from(atob(encoded), (character) => character.charCodeAt(0)).buffer);
    return [...readBank(arrays)].map(([name, row]) => [name, [...row]]);
}"""
CLEAN = """async ([texts, mode]) => {
    const { clean } = await import("./clean.js");
    return texts.map((text) => clean(text, mode));
}"""
TOKENIZE = """async ([texts, spec]) => {
    const [{ Tokenizer }, { clean }] = await Promise.all([import("./tokenizer.js"), import("./clean.js")]);
    const json = await (await fetch("tokenizer.json", { cache: "no-store" })).json();
    return [...new Tokenizer(json, spec).ids(texts.map((text) => clean(text, spec.clean)))].map(Number);
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's scripts."""
    folder = tmp_path_factory.mktemp("scripts")
    for source in (PAGE, ALONE):
        shutil.copytree(source, folder, dirs_exist_ok=True)
    (folder / "empty.html").write_text("<!doctype html>")
    (folder / "npm").mkdir()
    (folder / "npm" / "tokenizers.js").write_text("export class Tokenizer {}")
    return folder


@pytest.fixture(scope="module")
def node(folder: Path, start_node: Callable[[Path], Node]) -> Node:
    return start_node(folder)


@pytest.fixture(scope="module")
def tokenizing(folder: Path, start_node: Callable[[Path], Node]) -> Node:
    """Node with the library that the page tokenizes texts with, which npm downloads once into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("npm_config_fetch_retries", "0")
        try:
            (package,) = (package for package in PACKAGES if "tokenizers.js" in package.files)
            source = _cached(package) / package.files["tokenizers.js"]
        except ClipRdEdgeError as error:
            pytest.skip(str(error))
    shutil.copyfile(source, folder / "npm" / "tokenizers.js")
    return start_node(folder)


@pytest.fixture(scope="module")
def page(folder: Path, serve: Callable[..., str], browser: Any) -> Iterator[Any]:
    """An empty page that can import the scripts."""
    page = browser.new_page()
    page.goto(f"{serve(folder)}empty.html")
    yield page
    page.close()


@contextlib.contextmanager
def changed_browser(page: Any, script: str) -> Iterator[Any]:
    """Another page with the scripts, in a browser that `script` changes."""
    changed = page.context.browser.new_page()
    changed.add_init_script(script)
    changed.goto(page.url)
    yield changed
    changed.close()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resizing_matches_pillow_bit_for_bit(node: Node, interpolation: str) -> None:
    rng = np.random.default_rng(0)
    resample = getattr(Image.Resampling, interpolation.upper())
    for width, height in ((64, 64), (72, 73), (31, 300), (200, 31), (65, 63), (500, 333), (10, 7), (1, 1)):
        for new_size in ((64, 64), (65, 48), (17, 90)):
            noise = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
            image = Image.fromarray(noise[..., :3])
            # In two steps, columns first: from version 13 on, Pillow resizes the rows of some tall images first.
            expected = np.asarray(image.resize((new_size[0], height), resample).resize(new_size, resample)).ravel()
            pixels = node.evaluate(RESIZE, [to_base64(noise.tobytes()), width, *new_size, interpolation])
            assert pixels == expected.tolist(), (width, height, new_size)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_label_bank_is_read_as_in_python(node: Node, tmp_path: Path, precision: LabelPrecision) -> None:
    rows = np.random.default_rng(0).standard_normal((3, 40)) * 10.0 ** np.arange(-30, 10)
    rows = rows.clip(-6e4, 6e4).astype(np.float32)  # from below the smallest float16 to nearly the largest
    write_labels(tmp_path, LabelBank(("cat", "naïve café", "猫🐈"), rows), precision=precision)
    bank = read_labels(tmp_path)
    assert bank is not None
    rows_by_name = node.evaluate(READ_BANK, to_base64((tmp_path / "labels.npz").read_bytes()))
    assert rows_by_name == [[name, row] for name, row in zip(bank.names, bank.embeddings.tolist(), strict=True)]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_preprocessing_matches_python(node: Node, mode: Any, interpolation: Any) -> None:
    rng = np.random.default_rng(0)
    for size in ((64, 64), (65, 48)):
        preprocessing = Preprocessing(
            size=size, mean=(0.481, 0.457, 0.408), std=(0.268, 0.261, 0.275), resize_mode=mode, fill_color=7,
            interpolation=interpolation,
        )  # fmt: skip
        for width, height in ((64, 64), (90, 73), (73, 90), (200, 31), (333, 332), (12, 7), (65, 64), (5_000, 1)):
            if mode == "squash" and height > width:  # see resample.js on tall images
                continue
            noise = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
            expected = preprocess(Image.fromarray(noise[..., :3]), preprocessing).ravel()
            pixels = preprocess_in_page(node, noise.tobytes(), preprocessing, width)
            np.testing.assert_array_equal(pixels, expected, err_msg=f"{size} {width} × {height}")


def preprocess_in_page(page: Any, content: bytes, preprocessing: Preprocessing, width: int = 0) -> np.ndarray:
    pixels = page.evaluate(PREPROCESS, [to_base64(content), msgspec.to_builtins(preprocessing), width])
    return np.asarray(pixels, dtype=np.float32)


def test_files_are_opened_as_in_pillow(page: Any, tmp_path: Path) -> None:
    preprocessing = Preprocessing(size=(32, 32), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize((90, 60), Image.Resampling.BICUBIC)
    exif = smooth.getexif()
    exif[0x0112] = 6  # rotated by 90 degrees
    transparent = smooth.copy()
    transparent.putalpha(Image.linear_gradient("L").resize(smooth.size))
    large = smooth.resize((800, 600), Image.Resampling.BICUBIC)  # more than one strip
    for name, content, tolerance in (  # in grey levels
        ("png", encode(smooth, "PNG"), 0),
        ("large", encode(large, "PNG"), 0),
        ("wide", encode(smooth.resize((70_000, 2), Image.Resampling.BICUBIC), "PNG"), 0),  # too long for a canvas
        ("grey", encode(smooth.convert("L"), "PNG"), 0),
        ("gif", encode(smooth.convert("P"), "GIF"), 0),
        ("webp", encode(smooth, "WEBP", lossless=True), 0),
        ("transparent", encode(transparent, "PNG"), 1),  # compositing may round differently
        ("jpeg", encode(smooth, "JPEG", quality=90), 1),  # decoders may round differently
        ("rotated", encode(smooth, "JPEG", quality=90, exif=exif), 1),
        ("large webp", encode(large, "WEBP", lossless=True, exif=orientation(6)), 0),
        *((f"webp {turn}", encode(smooth, "WEBP", lossless=True, exif=orientation(turn)), 0) for turn in range(10)),
        ("webp for JPEG", encode(smooth, "WEBP", lossless=True, exif=b"Exif\0\0" + orientation(6, "<")), 0),
        ("damaged", encode(smooth, "WEBP", lossless=True, exif=orientation(6)[:4]), 0),
    ):
        (tmp_path / "image").write_bytes(content)
        expected = preprocess(open_image(tmp_path / "image"), preprocessing).ravel()
        difference = np.abs(preprocess_in_page(page, content, preprocessing) - expected).max() * 255
        assert difference <= tolerance + 1e-3, name


NOISE = """const { prototype } = OffscreenCanvasRenderingContext2D;
    const read = prototype.getImageData;
    prototype.getImageData = function (...box) {
        const image = read.apply(this, box);
        image.data.forEach((level, i, data) => (data[i] = Math.abs(level - ((i * 7919) % MAX))));
        return image;
    };"""


def test_images_whose_pixels_the_browser_hides_are_refused(page: Any) -> None:
    hidden = pytest.raises(Exception, match="This browser hides the pixels of images from pages")
    with changed_browser(page, NOISE.replace("MAX", "255")) as changed, hidden:
        preprocess_in_page(changed, encode(Image.new("RGB", (9, 6)), "PNG"), SMALL)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_images_are_upright_where_the_browser_does_not_turn_them(page: Any, tmp_path: Path, format: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8))
    not_turning = """const create = createImageBitmap;
        self.createImageBitmap = async (image, options) => {
            const bytes = new Uint8Array(await image.arrayBuffer());
            const place = String.fromCharCode(...bytes).search(/eXIf|EXIF/);
            if (place > 0) bytes[place] = "x".charCodeAt(0);
            return create(new Blob([bytes]), options);
        };"""
    datas = [orientation(turn, order, kind) for turn in range(10) for order in "<>" for kind in (SHORT, LONG)]
    with changed_browser(page, not_turning) as changed:
        for exif in (*datas, b"Exif\0\0" + orientation(6), orientation(6)[:4]):
            content = encode(image, format, lossless=True, exif=exif)
            (tmp_path / "image").write_bytes(content)
            expected = preprocess(open_image(tmp_path / "image"), SMALL).ravel()
            pixels = preprocess_in_page(changed, content, SMALL)
            np.testing.assert_array_equal(pixels, expected, err_msg=str(exif))


SHORT, LONG = 3, 4  # types of EXIF


def orientation(turn: int, order: str = ">", kind: int = SHORT) -> bytes:
    """EXIF data with nothing but an orientation; `order` is that of its bytes, as in `struct`."""
    mark = {">": b"MM", "<": b"II"}[order]
    value = struct.pack(order + {SHORT: "HH", LONG: "I"}[kind], turn, *[0] * (kind == SHORT))
    return mark + struct.pack(f"{order}HIHHHI", 42, 8, 1, 0x0112, kind, 1) + value + bytes(4)


PIECES = [
    *("a photo of a cat", "CAT", "Überstraße", "naïve café", "ﬁligree", "İstanbul", "ǅ", "猫と犬", "한국어", "ไทย"),
    *("हिन्दी", "العربية", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "👩‍🚀", "❤️", "👍🏽", "it's", "'S", "''s", "don\u2019t", "\u201cso\u201d", "`s"),
    *("cafe\u0301", "\u1112\u1161\u11ab", "A\u030a"),
    *("&amp;", "&amp;amp;", "&lt;b&gt;", "&#39;", "&eacute;", "&nbsp;", "&bogus;", "ＬＯＵＤ", "ﾀ", "Ġ", "_"),
    *("\x07", "\x1b[31m", "\x1c", "\u200b", "\ufeff", "\u2028", "\u00a0", "\u3000", "\t\n\r "),
    *("<end_of_text>", "<start_of_text>", "!<end_of_text>", "x<end_of_text>y", "</w>", "1984", "3.14", "½", "٣", "Ⅷ"),
    *("100%", "...", "?!", "—", "\\", '"'),
]


@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
def test_token_ids_match_python(tokenizing: Node, folder: Path, clean: Any) -> None:
    open_clip = pytest.importorskip("open_clip")
    from clip_rd_edge.models.tokenizers import export_tokenizer

    rng = random.Random(0)
    joined = [rng.choice(("", " ", "'")).join(rng.choices(PIECES, k=rng.randint(2, 6))) for _ in range(120)]
    texts = ["", " ", *PIECES, *joined, "word " * 50, "x" * 100, "猫" * 100]
    texts = [text for text in texts if "&" not in text]  # which takes a browser
    spec = export_tokenizer(open_clip.SimpleTokenizer(context_length=16), folder)
    assert_same_ids(tokenizing, folder, texts, TokenizerSpec(context_length=16, clean=clean, end_id=spec.end_id))


def test_truncation_keeps_the_special_tokens_around_a_text(tokenizing: Node, folder: Path) -> None:
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import models, pre_tokenizers, processors

    words = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "cat": 4, "##s": 5}
    fast = FastTokenizer(models.WordPiece(words, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    fast.save(str(folder / "tokenizer.json"))
    spec = TokenizerSpec(context_length=6, clean="whitespace", pad_id=9)
    assert_same_ids(tokenizing, folder, ["", "a cats", "a cats a cats a", "dog " * 9], spec)


def test_html_entities_are_decoded_as_in_python(page: Any) -> None:
    entities = [piece for piece in PIECES if "&" in piece]
    texts = [*entities, *(f"a <b> {entity}c {entity}" for entity in entities)]
    for mode in ("lower", "whitespace", "canonicalize"):
        cleaned = page.evaluate(CLEAN, [texts, mode])
        assert cleaned == [clean_text(text, mode) for text in texts]


def assert_same_ids(tokenizing: Node, folder: Path, texts: list[str], spec: TokenizerSpec) -> None:
    ids = np.asarray(tokenizing.evaluate(TOKENIZE, [texts, msgspec.to_builtins(spec)])).reshape(len(texts), -1)
    expected = Tokenizer(folder / "tokenizer.json", spec)(texts)
    wrong = [text for text, one, other in zip(texts, expected, ids, strict=True) if not np.array_equal(one, other)]
    assert wrong == []
