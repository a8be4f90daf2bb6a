"""What the browser does in JavaScript beside what Python does: pixels to the last bit, ids for whatever is typed."""

from __future__ import annotations

import base64
import io
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from clip_rd_edge.contract.images import open_image
from clip_rd_edge.contract.label_bank import LabelBank, LabelPrecision, read_labels, write_labels
from clip_rd_edge.contract.preprocess import Preprocessing, preprocess
from clip_rd_edge.contract.tokenizer import Tokenizer, TokenizerSpec
from clip_rd_edge.errors import ClipRdEdgeError
from clip_rd_edge.web.browser import ALONE, find_packages

pytestmark = [pytest.mark.browser, pytest.mark.slow]
CHROMIUM = Path("/usr/bin/chromium")
RESIZE = """async ([encoded, width, newWidth, newHeight, interpolation]) => {
    const { resize } = await import("./resample.js");
    const bytes = Uint8Array.from(atob(encoded), (each) => each.charCodeAt(0));
    const rows = (top, count) => bytes.subarray(top * width * 4, (top + count) * width * 4);
    const source = { width, height: bytes.length / width / 4, rows };
    return [...resize(source, newWidth, newHeight, interpolation)];
}"""
PREPROCESS = """async ([encoded, how, width]) => {
    const { decode, preprocess } = await import("./pixels.js");
    const bytes = Uint8ClampedArray.from(atob(encoded), (each) => each.charCodeAt(0));
    return [...preprocess(await decode(width ? new ImageData(bytes, width) : new Blob([bytes])), how)];
}"""
READ_BANK = """async (encoded) => {
    const [{ readNpz }, { bankOf }] = await Promise.all([import("./npz.js"), import("./model.js")]);
    const arrays = await readNpz(Uint8Array.from(atob(encoded), (each) => each.charCodeAt(0)).buffer);
    return [...bankOf(arrays)].map(([name, row]) => [name, [...row]]);
}"""
TOKENIZE = """async ([texts, spec]) => {
    const [{ Tokenizer }, { clean }] = await Promise.all([import("./tokenizer.js"), import("./clean.js")]);
    const json = await (await fetch("tokenizer.json", { cache: "no-store" })).json();
    return [...new Tokenizer(json, spec).ids(texts.map((text) => clean(text, spec.clean)))].map(Number);
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of the page and the library that they import."""
    try:
        tokenizers = find_packages()["tokenizers.js"]
    except ClipRdEdgeError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("scripts")
    shutil.copytree(ALONE, folder, dirs_exist_ok=True)
    (folder / "npm").mkdir()
    shutil.copyfile(tokenizers, folder / "npm" / "tokenizers.js")
    (folder / "empty.html").write_text("<!doctype html>")
    return folder


@pytest.fixture(scope="module")
def page(folder: Path, serve: Callable[..., str]) -> Iterator[Any]:
    """An empty page that can import the scripts."""
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto(f"{serve(folder)}empty.html")
        yield page
        browser.close()


def text_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resizing_is_pillow_s_to_the_last_bit(page: Any, interpolation: str) -> None:
    rng = np.random.default_rng(0)
    resample = getattr(Image.Resampling, interpolation.upper())
    for width, height in ((64, 64), (72, 73), (31, 300), (200, 31), (65, 63), (500, 333), (10, 7), (1, 1)):
        for new in ((64, 64), (65, 48), (17, 90)):
            noise = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
            picture = Image.fromarray(noise[..., :3])
            # Columns first, which Pillow does but for some tall pictures and from version 13 on.
            expected = np.asarray(picture.resize((new[0], height), resample).resize(new, resample)).ravel()
            given = page.evaluate(RESIZE, [text_of(noise.tobytes()), width, *new, interpolation])
            assert given == expected.tolist(), (width, height, new)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_label_bank_is_read_as_numpy_reads_it(page: Any, tmp_path: Path, precision: LabelPrecision) -> None:
    rows = np.random.default_rng(0).standard_normal((3, 40)) * 10.0 ** np.arange(-30, 10)
    rows = rows.clip(-6e4, 6e4).astype(np.float32)  # from what vanishes in float16 to nearly its largest
    write_labels(tmp_path, LabelBank(("cat", "naïve café", "猫🐈"), rows), precision=precision)
    bank = read_labels(tmp_path)
    assert bank is not None
    read = page.evaluate(READ_BANK, text_of((tmp_path / "labels.npz").read_bytes()))
    assert read == [[name, row] for name, row in zip(bank.names, bank.embeddings.tolist(), strict=True)]


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_preprocessing_is_the_contract_s(page: Any, mode: str) -> None:
    rng = np.random.default_rng(0)
    for size in ((64, 64), (65, 48)):
        how = Preprocessing(
            size=size, mean=(0.481, 0.457, 0.408), std=(0.268, 0.261, 0.275), resize_mode=mode, fill_color=7
        )
        for width, height in ((64, 64), (90, 73), (200, 31), (333, 332), (12, 7), (65, 64)):
            noise = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
            expected = preprocess(Image.fromarray(noise[..., :3]), how).ravel()
            given = from_page(page, noise.tobytes(), how, width)
            np.testing.assert_array_equal(given, expected, err_msg=f"{size} {width} × {height}")


def from_page(page: Any, content: bytes, how: Preprocessing, width: int = 0) -> np.ndarray:
    answer = page.evaluate(PREPROCESS, [text_of(content), msgspec.to_builtins(how), width])
    return np.asarray(answer, dtype=np.float32)


def test_files_are_opened_as_pillow_opens_them(page: Any, tmp_path: Path) -> None:
    how = Preprocessing(size=(32, 32), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize((90, 60), Image.Resampling.BICUBIC)
    exif = smooth.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    clear = smooth.copy()
    clear.putalpha(Image.linear_gradient("L").resize(smooth.size))
    large = smooth.resize((800, 600), Image.Resampling.BICUBIC)  # more than a strip
    for name, content, levels in (
        ("png", encoded(smooth, "PNG"), 0),
        ("large", encoded(large, "PNG"), 0),
        ("grey", encoded(smooth.convert("L"), "PNG"), 0),
        ("gif", encoded(smooth.convert("P"), "GIF"), 0),
        ("webp", encoded(smooth, "WEBP", lossless=True), 0),
        ("transparent", encoded(clear, "PNG"), 1),  # laid on white, where a canvas may round otherwise
        ("jpeg", encoded(smooth, "JPEG", quality=90), 1),  # decoders may round otherwise
        ("turned", encoded(smooth, "JPEG", quality=90, exif=exif), 1),
    ):
        (tmp_path / "picture").write_bytes(content)
        expected = preprocess(open_image(tmp_path / "picture"), how).ravel()
        difference = np.abs(from_page(page, content, how) - expected).max() * 255
        assert difference <= levels + 1e-3, name


def encoded(picture: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


PIECES = [
    *("a photo of a cat", "CAT", "Überstraße", "naïve café", "ﬁligree", "İstanbul", "ǅ", "猫と犬", "한국어", "ไทย"),
    *("हिन्दी", "العربية", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "👩‍🚀", "❤️", "👍🏽", "it's", "'S", "''s", "don\u2019t", "\u201cso\u201d", "`s"),
    *("&amp;", "&amp;amp;", "&lt;b&gt;", "&#39;", "&eacute;", "&nbsp;", "&bogus;", "ＬＯＵＤ", "ﾀ", "Ġ", "_"),
    *("\x07", "\x1b[31m", "\x1c", "\u200b", "\ufeff", "\u2028", "\u00a0", "\u3000", "\t\n\r "),
    *("<end_of_text>", "<start_of_text>", "!<end_of_text>", "x<end_of_text>y", "</w>", "1984", "3.14", "½", "٣", "Ⅷ"),
    *("100%", "...", "?!", "—", "\\", '"'),
]


@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
def test_ids_are_the_tokenizer_s(page: Any, folder: Path, clean: Any) -> None:
    open_clip = pytest.importorskip("open_clip")
    from clip_rd_edge.exporters.tokenizer import export_tokenizer

    rng = random.Random(0)
    joined = [rng.choice(("", " ", "'")).join(rng.choices(PIECES, k=rng.randint(2, 6))) for _ in range(300)]
    texts = ["", " ", *PIECES, *joined, "word " * 200, "x" * 500, "猫" * 500]
    spec = export_tokenizer(open_clip.SimpleTokenizer(context_length=16), folder)
    same_ids(page, folder, texts, TokenizerSpec(context_length=16, clean=clean, end_id=spec.end_id))


def test_a_tokenizer_whose_texts_are_cut_inside(page: Any, folder: Path) -> None:
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import models, pre_tokenizers, processors

    words = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "cat": 4, "##s": 5}
    fast = FastTokenizer(models.WordPiece(words, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    fast.save(str(folder / "tokenizer.json"))
    spec = TokenizerSpec(context_length=6, clean="whitespace", pad_id=9)
    same_ids(page, folder, ["", "a cats", "a cats a cats a", "dog " * 9], spec)


def same_ids(page: Any, folder: Path, texts: list[str], spec: TokenizerSpec) -> None:
    given = np.asarray(page.evaluate(TOKENIZE, [texts, msgspec.to_builtins(spec)])).reshape(len(texts), -1)
    expected = Tokenizer(folder / "tokenizer.json", spec)(texts)
    wrong = [text for text, one, other in zip(texts, expected, given, strict=True) if not np.array_equal(one, other)]
    assert wrong == []
