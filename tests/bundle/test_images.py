"""Image files, hostile and damaged ones too: opening one ends with an upright RGB image or an InputError."""

from __future__ import annotations

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

from clip_rd_edge.bundle.images import MAX_PIXELS, as_rgb, open_image, open_to_crop
from clip_rd_edge.errors import InputError

KINDS = [
    pytest.param(
        kind, marks=pytest.mark.skipif(kind in ("WEBP", "AVIF") and not features.check(kind.lower()), reason="no codec")
    )
    for kind in ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF")
]
WITH_EXIF = [kind for kind in KINDS if kind.values[0] in ("JPEG", "PNG", "WEBP", "AVIF", "TIFF")]


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, pixels: bytes = b"") -> bytes:
    """A greyscale PNG with these dimensions in its header; the pixels are compressed as given."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(pixels or bytes(1 + width) * height, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def refused(path: Path, content: bytes = b"") -> str:
    """Write a file, unless it is there; return the message with which it is refused."""
    if content:
        path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        open_image(path)
    assert str(path) in str(raised.value)
    assert raised.value.hint
    return str(raised.value)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"


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
    refused(tmp_path / "photo.png", content)


@pytest.mark.parametrize("kind", ["TGA", "PCX", "SGI", "IM", "XBM", "ICO", "ICNS", "JPEG2000", "DDS", "SPIDER", "PDF"])
def test_a_format_outside_the_list_is_refused_whatever_the_file_is_called(tmp_path: Path, kind: str) -> None:
    if kind == "JPEG2000" and not features.check("jpg_2000"):
        pytest.skip("this Pillow does not support JPEG 2000")
    mode = {"XBM": "1", "SPIDER": "F"}.get(kind, "RGB")
    buffer = io.BytesIO()  # given a path, Pillow's SPIDER registers the suffix for itself
    Image.new(mode, (32, 32)).save(buffer, format=kind)
    assert "in none of the formats" in refused(tmp_path / "image.jpg", buffer.getvalue())


@pytest.mark.parametrize("kind", KINDS)
def test_each_format_of_the_list_is_read_under_any_name(tmp_path: Path, kind: str) -> None:
    Image.new("RGB", (12, 8), (200, 30, 30)).save(tmp_path / "image", format=kind)
    assert open_image(tmp_path / "image").size == (12, 8)


@pytest.mark.parametrize("kind", ["named pipe", "device", "folder"])
def test_what_is_not_a_regular_file_is_refused_without_reading_it(tmp_path: Path, kind: str) -> None:
    path = {"named pipe": tmp_path / "pipe.png", "device": Path("/dev/zero"), "folder": tmp_path}[kind]
    if kind == "named pipe":
        os.mkfifo(path)
    assert "not a regular file" in refused(path)


@pytest.mark.parametrize("size", [(13_378, 13_378), (MAX_PIXELS + 1, 1), (2**31 - 1, 2**31 - 1), (1, MAX_PIXELS + 1)])
def test_more_pixels_than_the_limit_are_refused_before_decoding(tmp_path: Path, size: tuple[int, int]) -> None:
    assert f"{MAX_PIXELS:,}" in refused(tmp_path / "bomb.png", png(*size, pixels=b"\0" * 100))


def encoded(kind: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    exif = image.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, kind, **({} if kind in ("GIF", "BMP", "PPM") else {"exif": exif}))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_of_any_format_ends_with_an_image_or_an_input_error(tmp_path: Path, kind: str) -> None:
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


def test_a_file_that_is_cut_is_refused(tmp_path: Path) -> None:
    noise(64, 64).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    refused(tmp_path / "cut.jpg", content[: len(content) // 2])
    (tmp_path / "photo.jpg").touch()
    assert "it is empty" in refused(tmp_path / "photo.jpg")


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


@pytest.mark.parametrize("kind", WITH_EXIF[:3])
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


@pytest.mark.parametrize("kind", [*WITH_EXIF, "MPO"])
@pytest.mark.parametrize("orientation", [2, 6])
def test_an_image_that_was_turned_is_not_turned_again(tmp_path: Path, kind: str, orientation: int) -> None:
    y, x = np.mgrid[0:90, 0:120]
    photo = Image.fromarray(np.stack([2 * x, 2 * y, x + y], axis=-1).astype(np.uint8))
    photo.save(tmp_path / "photo", kind, exif=turned(orientation))
    upright = open_image(tmp_path / "photo")
    with Image.open(tmp_path / "photo") as stored:
        assert upright.size == ImageOps.exif_transpose(stored).size
    np.testing.assert_array_equal(np.asarray(as_rgb(upright)), np.asarray(upright))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(("data", "size"), [(b"", (20, 10)), (turned(8).tobytes(), (10, 20))])
def test_the_orientation_of_xmp_turns_no_image(kind: str, data: bytes, size: tuple[int, int]) -> None:
    xmp, buffer, text = '<rdf:Description tiff:Orientation="6"/>', io.BytesIO(), PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", xmp)
    options: dict[str, Any] = {"pnginfo": text} if kind == "PNG" else {"xmp": xmp.encode()}
    Image.new("RGB", (20, 10)).save(buffer, kind, **options, **({"exif": data} if data else {}))
    with Image.open(buffer) as image:
        image.load()
        before = dict(image.info)
        assert as_rgb(image).size == size
        assert image.info == before  # which the caller may need


@pytest.mark.parametrize("suffix", ["png", "webp", "avif", "gif"])
def test_partial_transparency_is_blended_with_white(tmp_path: Path, suffix: str) -> None:
    if suffix in ("webp", "avif") and not features.check(suffix):
        pytest.skip(f"this Pillow does not support {suffix}")
    image = Image.new("RGBA", (32, 32), (200, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 16, 32))
    if suffix != "gif":  # GIF has no partial transparency
        image.paste((200, 0, 0, 128), (16, 16, 32, 32))
    image.save(tmp_path / f"image.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    opened = np.asarray(open_image(tmp_path / f"image.{suffix}")).astype(int)
    expected = {(4, 8): (255, 255, 255), (8, 24): (200, 0, 0)}
    if suffix != "gif":
        expected[24, 24] = (227, 127, 127)
    for position, colour in expected.items():
        assert np.abs(opened[position] - colour).max() <= (6 if suffix == "avif" else 1)


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


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 128, 255], [0, 128, 255]),  # levels of 8 bits in 16 or 32
        ([0, 257 * 128, 65535], [0, 128, 255]),
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([-0.001, 0.2, 1.001], [0, 51, 255]),  # interpolated
        ([0.0, 51.4, 255.0], [0, 51, 255]),
        ([0, 0, 0], [0, 0, 0]),
    ],
)
def test_deep_greyscale_is_scaled_by_its_range(tmp_path: Path, values: list[float], expected: list[int]) -> None:
    deep = np.asarray([values])
    kinds = ("float32",) if deep.dtype == np.float64 else ("uint16", "int32")
    for kind in kinds:
        image = Image.fromarray(deep.astype(kind))
        image.save(tmp_path / "deep.tif")
        for opened in (open_image(tmp_path / "deep.tif"), as_rgb(image)):
            assert np.asarray(opened)[0, :, 0].tolist() == expected, kind


@pytest.mark.parametrize(
    "values", [[0, 4095], [0, 70000], [-300, 20000], [0.0, 3.5], [-1.0, 1.0], [15.5, 8848.0], [0.5, np.nan]]
)
def test_deep_greyscale_of_an_unknown_range_is_refused(tmp_path: Path, values: list[float]) -> None:
    """Of 12 bits, it would be black."""
    image = Image.fromarray(np.asarray([values], dtype="int32" if isinstance(values[0], int) else "float32"))
    image.save(tmp_path / "deep.tif")
    for given in (tmp_path / "deep.tif", image):
        with pytest.raises(InputError, match="values range from"):
            as_rgb(given)


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


def test_an_opened_image_does_not_depend_on_its_file(tmp_path: Path) -> None:
    path, image = tmp_path / "mapped.bmp", noise(64, 64)  # Pillow memory-maps such a file
    image.save(path)
    opened = open_image(path)
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert opened.tobytes() == image.tobytes()


def test_a_large_jpeg_can_be_decoded_at_reduced_size(tmp_path: Path) -> None:
    coarse = noise(8, 6).resize((800, 600))
    for name in ("photo.jpg", "drawing.png"):
        coarse.save(tmp_path / name)
    whole = open_image(tmp_path / "photo.jpg")
    quick = open_image(tmp_path / "photo.jpg", min_edge=128)
    assert (whole.size, quick.size) == ((800, 600), (200, 150))
    assert open_image(tmp_path / "photo.jpg", min_edge=301).size == (800, 600)
    assert open_image(tmp_path / "drawing.png", min_edge=128).size == (800, 600)
    difference = np.asarray(whole.resize((64, 48)), dtype=float) - np.asarray(quick.resize((64, 48)), dtype=float)
    assert np.abs(difference).mean() < 3


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_crop_of_a_jpeg_is_that_of_the_whole_image_at_the_smallest_size_with_enough_pixels(
    orientation: int, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(8, 6).resize((808, 608)).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    upright = open_image(tmp_path / "photo.jpg")
    box = (upright.width * 0.1, upright.height * 0.2, upright.width * 0.9, upright.height * 0.8)
    sizes = list[tuple[int, int]]()

    def draw(size: tuple[int, int]) -> tuple[float, float, float, float]:
        sizes.append(size)
        return box

    for min_edge, fraction in ((None, 1), (300, 1), (150, 2), (74, 4), (20, 8)):
        image, own = open_to_crop(tmp_path / "photo.jpg", draw, min_edge=min_edge)
        assert image.size == tuple(-(-edge // fraction) for edge in upright.size)
        assert own == pytest.approx([edge / fraction for edge in box])
        crops = [np.asarray(one.resize((32, 32), box=edges), float) for one, edges in ((upright, box), (image, own))]
        assert np.abs(crops[0] - crops[1]).mean() < (3 if fraction > 1 else 1e-9)
    assert set(sizes) == {upright.size}
