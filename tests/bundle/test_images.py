"""Hostile and damaged image files: whatever is in them, opening one ends with an image or an InputError."""

from __future__ import annotations

import ast
import io
import os
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, TiffImagePlugin, features

import clip_rd_edge
from clip_rd_edge.bundle import images
from clip_rd_edge.bundle.images import MAX_PIXELS, as_rgb, open_image
from clip_rd_edge.bundle.preprocess import Preprocessing, preprocess
from clip_rd_edge.errors import InputError

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, pixels: bytes = b"") -> bytes:
    """A greyscale PNG with these dimensions in its header; the pixels are compressed as given."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(pixels or bytes(1 + width) * height, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content", [POSTSCRIPT, b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, 99) + bytes(20) + POSTSCRIPT]
)
def test_postscript_under_an_image_name_never_reaches_ghostscript(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    from PIL import EpsImagePlugin  # registers EPS with Pillow, as any other code in this process may have done

    def run(*arguments: object, **options: object) -> None:
        pytest.fail("Ghostscript was called")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    (tmp_path / "photo.png").write_bytes(content)
    with pytest.raises(InputError, match=r"photo\.png: it is in none of the formats JPEG, PNG"):
        open_image(tmp_path / "photo.png")


@pytest.mark.parametrize("kind", ["TGA", "PCX", "SGI", "IM", "XBM", "ICO", "ICNS", "JPEG2000", "DDS", "SPIDER", "PDF"])
def test_a_format_outside_the_list_is_refused_whatever_the_file_is_called(tmp_path: Path, kind: str) -> None:
    if kind == "JPEG2000" and not features.check("jpg_2000"):
        pytest.skip("this Pillow does not support JPEG 2000")
    mode = {"XBM": "1", "SPIDER": "F"}.get(kind, "RGB")
    buffer = io.BytesIO()  # given a path, Pillow's SPIDER registers the suffix for itself
    Image.new(mode, (32, 32)).save(buffer, format=kind)
    (tmp_path / "image.jpg").write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match="in none of the formats"):
        open_image(tmp_path / "image.jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF"])
def test_each_format_of_the_list_is_read_under_any_name(tmp_path: Path, kind: str) -> None:
    if kind in ("WEBP", "AVIF") and not features.check(kind.lower()):
        pytest.skip(f"this Pillow does not support {kind}")
    Image.new("RGB", (12, 8), (200, 30, 30)).save(tmp_path / "image", format=kind)
    assert open_image(tmp_path / "image").size == (12, 8)


def test_the_package_opens_images_in_one_place_only() -> None:
    root = Path(clip_rd_edge.__file__).parent
    unrestricted = []
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open":
                keywords = {keyword.arg for keyword in node.keywords}
                if "formats" not in keywords:
                    unrestricted.append(f"{path.relative_to(root)}:{node.lineno}")
    assert unrestricted == []


@pytest.mark.parametrize("kind", ["named pipe", "device", "folder"])
def test_what_is_not_a_regular_file_is_refused_without_reading_it(tmp_path: Path, kind: str) -> None:
    path = {"named pipe": tmp_path / "pipe.png", "device": Path("/dev/zero"), "folder": tmp_path}[kind]
    if kind == "named pipe":
        os.mkfifo(path)
    with pytest.raises(InputError, match="is not a regular file"):
        open_image(path)


@pytest.mark.parametrize("size", [(13_378, 13_378), (MAX_PIXELS + 1, 1), (2**31 - 1, 2**31 - 1), (1, MAX_PIXELS + 1)])
def test_more_pixels_than_the_limit_are_refused_before_decoding(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "bomb.png").write_bytes(png(*size, pixels=b"\0" * 100))
    with pytest.raises(InputError, match=r"178,956,970"):
        open_image(tmp_path / "bomb.png")


def test_the_limit_on_pixels_is_what_pillow_accepts(tmp_path: Path) -> None:
    width = 13_377
    height = MAX_PIXELS // width
    (tmp_path / "large.png").write_bytes(png(width, height, pixels=b"\0" * 100))
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(InputError, match=r"truncated|damaged|broken|unexpected"),
    ):
        open_image(tmp_path / "large.png")  # gets as far as decoding, which fails: the pixels are missing


def encoded(kind: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    exif = image.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, kind, **({} if kind in ("GIF", "BMP", "PPM") else {"exif": exif}))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF"])
def test_a_damaged_file_of_any_format_ends_with_an_image_or_an_input_error(tmp_path: Path, kind: str) -> None:
    if kind in ("WEBP", "AVIF") and not features.check(kind.lower()):
        pytest.skip(f"this Pillow does not support {kind}")
    whole, rng, path = encoded(kind), random.Random(0), tmp_path / "damaged"
    refused = 0
    for round_ in range(150):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            content[rng.randrange(min(len(content), 300))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        if round_ % 3 == 0:
            del content[rng.randrange(len(content)) :]
        path.write_bytes(bytes(content))
        try:
            assert open_image(path).mode == "RGB"
        except InputError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    "error", [struct.error("x"), IndexError("x"), TypeError("x"), KeyError(7), RecursionError("x")]
)
def test_whatever_a_decoder_raises_becomes_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(image: Image.Image) -> Image.Image:
        raise error

    monkeypatch.setattr(images, "to_rgb", fail)
    (tmp_path / "a.png").write_bytes(png(3, 3))
    with pytest.raises(
        InputError, match=rf"a\.png: its content is damaged \({type(error).__name__} in the decoder\)\.$"
    ):
        open_image(tmp_path / "a.png")


STRIPS = [(150_000, 1), (1, 150_000), (100_000, 3), (7, 90_000), (40_000, 300), (20_000, 64), (64, 3_000)]


@pytest.mark.parametrize("size", STRIPS)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("target", [(64, 64), (48, 65)])
def test_a_strip_is_cropped_before_it_is_resized(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], interpolation: str, target: tuple[int, int]
) -> None:
    resized: list[int] = []
    original = Image.Image.resize

    def resize(image: Image.Image, size: tuple[int, int], *args: object, **options: object) -> Image.Image:
        resized.append(size[0] * size[1])
        return original(image, size, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", resize)
    preprocessing = Preprocessing(size=target, mean=MEAN, std=STD, interpolation=interpolation)  # type: ignore[arg-type]
    assert preprocess(Image.new("RGB", size, (9, 99, 200)), preprocessing).shape == (3, *target)
    assert max(resized) <= 16 * target[0] * target[1]


@pytest.mark.parametrize("size", [(1100, 64), (64, 1100), (2000, 50), (9, 700), (3000, 131), (1, 400), (70, 1500)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("target", [(64, 64), (48, 65)])
def test_a_strip_gets_the_values_of_resizing_all_of_it(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], interpolation: str, target: tuple[int, int]
) -> None:
    original = Image.Image.resize

    def columns_first(image: Image.Image, size: tuple[int, int], resample: int, box: Any = None) -> Image.Image:
        """Always in this order: Pillow 13 resizes the rows first if that is faster, which rounds differently."""
        left, top, right, bottom = box or (0, 0, *image.size)
        columns = original(image, (size[0], image.height), resample, (left, 0, right, image.height))
        return original(columns, size, resample, (0, top, size[0], bottom))

    monkeypatch.setattr(Image.Image, "resize", columns_first)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    preprocessing = Preprocessing(
        size=target,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        interpolation=interpolation,  # type: ignore[arg-type]
    )
    cropped_first = preprocess(image, preprocessing)
    monkeypatch.setattr("clip_rd_edge.bundle.preprocess._MAX_RESIZED", 1e9)
    levels = np.abs(cropped_first - preprocess(image, preprocessing)) * 255
    assert levels.max() <= 1.01
    assert (levels > 0.5).mean() < 0.01


@pytest.mark.parametrize("size", [(150_000, 1), (1, 150_000), (500, 1)])
def test_padding_a_strip_keeps_at_least_one_row_of_it(size: tuple[int, int]) -> None:
    for target in ((64, 64), (48, 65)):
        preprocessing = Preprocessing(size=target, mean=MEAN, std=STD, resize_mode="longest")
        assert preprocess(Image.new("RGB", size), preprocessing).shape == (3, *target)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("target", [(48, 64), (65, 31)])
def test_sizes_that_are_not_square_match_open_clip(mode: Any, interpolation: Any, target: tuple[int, int]) -> None:
    transform = pytest.importorskip("open_clip.transform")
    cfg = transform.PreprocessCfg(size=target, mean=MEAN, std=STD, interpolation=interpolation, resize_mode=mode)
    reference = transform.image_transform_v2(cfg, is_train=False)
    preprocessing = Preprocessing(size=target, mean=MEAN, std=STD, interpolation=interpolation, resize_mode=mode)
    rng = np.random.default_rng(0)
    for _ in range(20):
        height, width = rng.integers(9, 200, 2)
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        np.testing.assert_array_equal(preprocess(image, preprocessing), reference(image).numpy())


def test_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"photo\.jpg: it is empty") as caught:
        open_image(tmp_path / "photo.jpg")
    assert "convert" not in caught.value.hint


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("nope.jpg", r"nope\.jpg: the file does not exist", "check the path"),
        ("~/a.jpg", "does not exist", "expanduser"),
        ("phone/*.jpg", "does not exist", "glob"),
        ("https://x.org/a.jpg", "'https://x.org/a.jpg' is an address", "download it"),
        ("", "is empty", "variable"),
    ],
)
def test_the_hint_for_a_missing_image_says_what_to_do_about_its_path(name: str, message: str, hint: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        images.as_rgb(name)
    assert hint in caught.value.hint
    assert "convert" not in caught.value.hint


def exif(tag: int, kind: int, value: bytes) -> bytes:
    """EXIF data with orientation 6, a quarter turn, and a tag of a type that it should not have."""
    fields = struct.pack("<HHIHH", 0x112, 3, 1, 6, 0) + struct.pack("<HHI", tag, kind, 1) + value.ljust(4, b"\0")[:4]
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + fields + struct.pack("<I", 0) + value[4:]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    "odd",
    [
        exif(0x11A, 10, struct.pack("<Iii", 38, -3, 7)),  # a resolution below 0
        exif(0x100, 9, struct.pack("<i", -5)),  # so is the width
        exif(0x128, 2, b"abc"),  # a unit in words
        exif(0x11A, 11, struct.pack("<f", float("nan"))),
    ],
)
def test_odd_exif_data_does_not_keep_an_image_from_being_turned(tmp_path: Path, kind: str, odd: bytes) -> None:
    path = tmp_path / "image"
    Image.new("RGB", (20, 10)).save(path, kind, exif=odd)
    assert open_image(path).size == (10, 20)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("damaged", [b"garbage", bytes(20), b"II*\0"])
def test_an_image_whose_exif_data_are_damaged_is_upright(tmp_path: Path, kind: str, damaged: bytes) -> None:
    path = tmp_path / "image"
    Image.new("RGB", (20, 10)).save(path, kind, exif=damaged)
    assert open_image(path).size == (20, 10)


def turned(orientation: int) -> Image.Exif:
    """EXIF data with nothing but an orientation."""
    data = Image.Exif()
    data[ExifTags.Base.Orientation] = orientation
    return data


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_orientation_turns_an_image_as_pillow_does(tmp_path: Path, orientation: int) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 20, 3), dtype=np.uint8))
    image.save(tmp_path / "image", "PNG", exif=turned(orientation))
    with Image.open(tmp_path / "image") as stored:
        expected = ImageOps.exif_transpose(stored)
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "image")), np.asarray(expected))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "MPO"])
@pytest.mark.parametrize("orientation", [2, 6])
def test_an_image_that_was_turned_is_not_turned_again(tmp_path: Path, kind: str, orientation: int) -> None:
    if kind in ("WEBP", "AVIF") and not features.check(kind.lower()):
        pytest.skip(f"this Pillow does not support {kind}")
    y, x = np.mgrid[0:90, 0:120]
    photo = Image.fromarray(np.stack([2 * x, 2 * y, x + y], axis=-1).astype(np.uint8))
    photo.save(tmp_path / "photo", kind, exif=turned(orientation))
    upright = open_image(tmp_path / "photo")
    with Image.open(tmp_path / "photo") as stored:
        assert upright.size == ImageOps.exif_transpose(stored).size
    np.testing.assert_array_equal(np.asarray(as_rgb(upright)), np.asarray(upright))


def test_avif_is_named_where_pillow_does_not_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    (tmp_path / "photo.avif").write_bytes(struct.pack(">I4s4s", 24, b"ftyp", b"avif") + bytes(12))
    with pytest.raises(InputError, match=r"photo\.avif: it is AVIF, which this Pillow, .*, does not read") as raised:
        open_image(tmp_path / "photo.avif")
    assert raised.value.hint == 'pip install "pillow>=11.3", or convert it to JPEG'


@pytest.mark.parametrize("orientation", [1, 3])
def test_the_transparent_level_of_deep_greyscale_becomes_the_background(tmp_path: Path, orientation: int) -> None:
    buffer = io.BytesIO()
    levels = np.array([[0, 1, 20_000], [40_000, 65_535, 0]], dtype=np.uint16)
    Image.fromarray(levels).save(buffer, "PNG", exif=turned(orientation))
    before, kind, pixels = buffer.getvalue().partition(b"IDAT")
    content = before[:-4] + chunk(b"tRNS", struct.pack(">H", 0)) + before[-4:] + kind + pixels
    (tmp_path / "scan.png").write_bytes(content)
    expected = np.array([[255, 0, 78], [156, 255, 255]])
    step = 1 if orientation == 1 else -1
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "scan.png"))[::step, ::step, 0], expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize(("data", "size"), [(b"", (20, 10)), (turned(8).tobytes(), (10, 20))])
def test_the_orientation_of_xmp_turns_no_image(kind: str, data: bytes, size: tuple[int, int]) -> None:
    if kind in ("WEBP", "AVIF") and not features.check(kind.lower()):
        pytest.skip(f"this Pillow does not support {kind}")
    xmp, buffer = '<rdf:Description tiff:Orientation="6"/>', io.BytesIO()
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", xmp)
    options: dict[str, Any] = {"pnginfo": text} if kind == "PNG" else {"xmp": xmp.encode()}
    Image.new("RGB", (20, 10)).save(buffer, kind, **options, **({"exif": data} if data else {}))
    with Image.open(buffer) as image:
        image.load()
        before = dict(image.info)
        assert as_rgb(image).size == size
        assert image.info == before  # which the caller may need


def test_what_the_first_frame_of_a_gif_leaves_of_the_canvas_is_white(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (200, 0, 0)).save(buffer, "GIF")
    content = bytearray(buffer.getvalue())
    frame = content.index(b",\0\0\0\0\4\0\3\0")
    content[6:10] = struct.pack("<HH", 8, 6)
    content[frame + 1 : frame + 5] = struct.pack("<HH", 2, 1)
    (tmp_path / "part.gif").write_bytes(content)
    expected = np.full((6, 8, 3), 255, dtype=np.uint8)
    expected[1:4, 2:6] = (200, 0, 0)
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "part.gif")), expected)


@pytest.mark.parametrize("orientation", [1, 3])
def test_deep_greyscale_whose_zero_is_white_is_no_negative(tmp_path: Path, orientation: int) -> None:
    """As X-ray detectors and film scanners write it; of such images, Pillow inverts those of up to 8 bits alone."""
    levels = np.array([[0, 257 * 100, 65_535]], dtype=np.uint16)
    tags = {TiffImagePlugin.PHOTOMETRIC_INTERPRETATION: 0, ExifTags.Base.Orientation: orientation}
    Image.fromarray(levels).save(tmp_path / "scan.tif", tiffinfo=tags)
    step = 1 if orientation == 1 else -1
    with Image.open(tmp_path / "scan.tif") as opened:
        for rgb in (open_image(tmp_path / "scan.tif"), as_rgb(opened)):
            assert np.asarray(rgb)[0, ::step, 0].tolist() == [255, 155, 0]


def tiff(tags: dict[int, tuple[int, ...]], pixels: bytes) -> bytes:
    """A TIFF of two by one pixels with these tags and, if there are several planes, one strip per plane."""
    planes = len(tags[258]) if tags.get(284) == (2,) else 1
    tags = {256: (2,), 257: (1,), 259: (1,), 273: (0,) * planes, 277: (len(tags[258]),), 278: (1,), **tags}
    tags[279] = (len(pixels) // planes,) * planes
    start = 8 + 2 + 12 * len(tags) + 4
    end = start + sum(4 * len(values) for values in tags.values() if len(values) > 1)
    tags[273] = tuple(end + len(pixels) // planes * plane for plane in range(planes))
    entries, long = b"", b""
    for tag, values in sorted(tags.items()):
        content = struct.pack(f"<{len(values)}I", *values)
        if len(values) > 1:
            content, long = struct.pack("<I", start + len(long)), long + content
        entries += struct.pack("<HHI", tag, 4, len(values)) + content
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + long + pixels


def test_a_tiff_of_16_bits_in_separate_planes_is_refused(tmp_path: Path) -> None:
    """Pillow takes 8 of 16 bits and would show noise."""
    path = tmp_path / "bands.tif"
    for planes, levels in ((1, [1, 2, 3, 4, 5, 6]), (2, [1, 4, 2, 5, 3, 6])):
        pixels = np.array(levels, dtype=np.uint8)
        path.write_bytes(tiff({258: (8, 8, 8), 262: (2,), 284: (planes,)}, pixels.tobytes()))
        assert np.asarray(open_image(path)).tolist() == [[[1, 2, 3], [4, 5, 6]]]
        path.write_bytes(tiff({258: (16, 16, 16), 262: (2,), 284: (planes,)}, (pixels.astype("<u2") * 257).tobytes()))
        if planes == 1:
            assert np.asarray(open_image(path)).tolist() == [[[1, 2, 3], [4, 5, 6]]]
    message = r"it has 16 bits per channel in separate planes, which this Pillow, [\d.]+, does not decode\.$"
    for read in (open_image, images.require_image):
        with pytest.raises(InputError, match=rf"bands\.tif: {message}"):
            read(path)
    with Image.open(path) as opened, pytest.raises(InputError, match=f"mode RGB cannot be read: {message}"):
        as_rgb(opened)


@pytest.mark.parametrize(
    "content",
    [
        tiff({258: (32, 32, 32), 262: (2,), 339: (3, 3, 3)}, bytes(24)),
        tiff({258: (8, 8, 8, 8, 8), 262: (5,), 338: (2,)}, bytes(10)),
        b"MM\0*\0\0\0\x08",
        b"II+\0\x08\0\0\0",
    ],
)
def test_a_tiff_that_pillow_does_not_read_is_called_a_tiff(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "scan.tif").write_bytes(content)
    with pytest.raises(InputError, match=r"scan\.tif: it is a TIFF of a kind that .* or damaged\.$") as raised:
        open_image(tmp_path / "scan.tif")
    assert raised.value.hint == "convert it to an 8-bit JPEG or PNG, or leave it out"
