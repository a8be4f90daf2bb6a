from __future__ import annotations

import base64
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from clip_rd_edge.bundle.images import as_rgb, open_image
from clip_rd_edge.bundle.preprocess import Preprocessing, preprocess, to_uint8
from clip_rd_edge.errors import InputError

MEAN, STD = (0.481, 0.457, 0.408), (0.268, 0.261, 0.275)
SIZES = [(64, 64), (72, 72), (31, 200), (200, 31), (65, 63), (500, 333), (10, 7), (1, 1), (224, 225)]


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", SIZES)
def test_preprocessing_is_bit_identical_to_open_clip(mode: str, interpolation: str, size: tuple[int, int]) -> None:
    transform = pytest.importorskip("open_clip.transform")
    cfg = transform.PreprocessCfg(size=64, mean=MEAN, std=STD, interpolation=interpolation, resize_mode=mode)
    reference = transform.image_transform_v2(cfg, is_train=False)
    preprocessing = Preprocessing(size=(64, 64), mean=MEAN, std=STD, interpolation=interpolation, resize_mode=mode)
    image = noise(*size)
    np.testing.assert_array_equal(preprocess(image, preprocessing), reference(image).numpy())


def test_the_pixels_of_a_preprocessed_image_are_found_again() -> None:
    image = noise(64, 64)
    preprocessing = Preprocessing(size=(64, 64), mean=MEAN, std=STD)
    np.testing.assert_array_equal(to_uint8(preprocess(image, preprocessing)[None], preprocessing)[0], np.asarray(image))


def test_transparent_images_get_a_white_background(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_honoured(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 3))
    exif = image.getexif()
    exif[0x0112] = 6  # rotated by 90 degrees
    image.save(tmp_path / "rotated.jpg", exif=exif)
    assert open_image(tmp_path / "rotated.jpg").size == (3, 6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(tmp_path: Path, orientation: int) -> None:
    upright = Image.new("RGB", (40, 24), "white")
    upright.paste((200, 0, 0), (0, 0, 20, 12))  # every rotation and reflection changes this image
    stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    image = upright.transpose(stored[orientation]) if orientation in stored else upright
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "image.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "image.png")), np.asarray(upright))


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


HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAX1tZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAACJpbG9j"
    "AAAAAERAAAEAAQAAAAABoQABAAAAAAAAAB8AAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRtAAAAAAABAAAA/Wlw"
    "cnAAAADdaXBjbwAAAHZodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQAqQgEBA3AA"
    "AAMAkAAAAwAAAwAeoCCBBZbq5Ka5uAhoMCAAAAMDIAAAAwAhYgABAAZEAcFzwIkAAAATY29scm5jbHgAAQANAAaAAAAAFGlzcGUAAAAAAAAA"
    "QAAAAEAAAAAoY2xhcAAAAEAAAAABAAAAMAAAAAEAAAAAAAAAAv////AAAAACAAAAEHBpeGkAAAAAAwgICAAAABhpcG1hAAAAAAAAAAEAAQWB"
    "AgMFhAAAACdtZGF0AAAAGygBrwY4iS58L/UgT///j1f2X90Q2zNTCc4z8A=="
)  # 64 × 48 pixels of (220, 30, 30)


def test_heic_is_read_if_pillow_heif_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    (tmp_path / "red.heic").write_bytes(HEIC)
    image = open_image(tmp_path / "red.heic")
    assert image.size == (64, 48)
    assert np.abs(np.asarray(image).astype(int) - (220, 30, 30)).max() <= 4


def test_heic_without_pillow_heif_is_reported_with_the_pip_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import PIL.Image

    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    PIL.Image.init()
    for name in [name for name in PIL.Image.ID if name in ("HEIF", "HEIC")]:  # registered by another test
        monkeypatch.delitem(PIL.Image.OPEN, name)
        monkeypatch.setattr(PIL.Image, "ID", [other for other in PIL.Image.ID if other != name])
    (tmp_path / "red.heic").write_bytes(HEIC)
    with pytest.raises(InputError, match=r"red\.heic: it is HEIC, which Pillow reads only with the package") as raised:
        open_image(tmp_path / "red.heic")
    assert raised.value.hint.startswith("pip install pillow-heif")


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "png"), ("CMYK", "jpg"), ("P", "gif"), ("1", "png"), ("LA", "png"), ("I;16", "png")]
)
def test_any_mode_is_converted_to_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    Image.new(mode, (5, 4)).save(tmp_path / f"image.{suffix}")
    assert open_image(tmp_path / f"image.{suffix}").mode == "RGB"


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 32896, dtype=np.uint16)).save(tmp_path / "grey.png")
    assert open_image(tmp_path / "grey.png").getpixel((0, 0)) == (128, 128, 128)


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


def test_sixteen_bits_may_be_big_endian(tmp_path: Path) -> None:
    """As ImageJ and scanners write them."""
    ramp = np.asarray([[0, 257 * 128, 65535]], dtype=">u2")
    Image.frombytes("I;16B", (3, 1), ramp.tobytes()).save(tmp_path / "ramp.tif")
    with Image.open(tmp_path / "ramp.tif") as image:
        assert image.mode == "I;16B"
    assert np.asarray(open_image(tmp_path / "ramp.tif"))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, 4095], "from 0 to 4095; expected a range from 0 to 255 or to 65535"),  # 12 bits would be black
        ([0, 70000], "from 0 to 70000"),
        ([-300, 20000], "from -300 to 20000"),
        ([0.0, 3.5], "from 0 to 3.5; expected a range from 0 to 1 or to 255"),
        ([-1.0, 1.0], "from -1 to 1"),
        ([15.5, 8848.0], "from 15.5 to 8848"),
        ([0.5, np.nan], "nan"),
    ],
)
def test_deep_greyscale_of_an_unknown_range_is_refused(tmp_path: Path, values: list[float], message: str) -> None:
    image = Image.fromarray(np.asarray([values], dtype="int32" if isinstance(values[0], int) else "float32"))
    image.save(tmp_path / "deep.tif")
    for given in (tmp_path / "deep.tif", image):
        with pytest.raises(InputError, match=message) as raised:
            as_rgb(given)
        assert "8" in raised.value.hint


def test_a_tiff_of_12_bits_is_scaled_by_what_it_says(tmp_path: Path) -> None:
    pixels = bytes.fromhex("000fff400000")  # 0, 4095, 1024 and 0
    fields = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 134), (274, 3), (277, 1), (278, 1), (279, 6)]
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag != 258 else 3, 1, value) for tag, value in fields)
    header = b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + bytes(4)
    (tmp_path / "deep.tif").write_bytes(header + pixels)
    assert np.asarray(open_image(tmp_path / "deep.tif"))[0, :, 0].tolist() == [0, 64, 255, 0]  # and upside down


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n then nothing"])
def test_a_file_that_is_not_an_image_is_reported(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.png"):
        open_image(tmp_path / "bad.png")


def test_a_truncated_jpeg_is_refused(tmp_path: Path) -> None:
    noise(64, 64).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"cut\.jpg"):
        open_image(tmp_path / "cut.jpg")


def test_a_missing_image_is_reported() -> None:
    with pytest.raises(InputError, match="the file does not exist"):
        open_image(Path("nowhere.png"))


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
