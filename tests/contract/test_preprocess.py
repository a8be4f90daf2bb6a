from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_rd_edge.contract.preprocess import Preprocessing, open_image, preprocess
from clip_rd_edge.errors import InputError

MEAN, STD = (0.481, 0.457, 0.408), (0.268, 0.261, 0.275)
SIZES = [(64, 64), (72, 72), (31, 200), (200, 31), (65, 63), (500, 333), (10, 7), (1, 1), (224, 225)]


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", SIZES)
def test_equal_to_open_clip_bit_for_bit(mode: str, interpolation: str, size: tuple[int, int]) -> None:
    transform = pytest.importorskip("open_clip.transform")
    cfg = transform.PreprocessCfg(size=64, mean=MEAN, std=STD, interpolation=interpolation, resize_mode=mode)
    theirs = transform.image_transform_v2(cfg, is_train=False)
    ours = Preprocessing(size=(64, 64), mean=MEAN, std=STD, interpolation=interpolation, resize_mode=mode)
    picture = noise(*size)
    np.testing.assert_array_equal(preprocess(picture, ours), theirs(picture).numpy())


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_honoured(tmp_path: Path) -> None:
    picture = Image.new("RGB", (6, 3))
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (3, 6)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "png"), ("CMYK", "jpg"), ("P", "gif"), ("1", "png"), ("LA", "png"), ("I;16", "png")]
)
def test_any_mode_becomes_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    Image.new(mode, (5, 4)).save(tmp_path / f"picture.{suffix}")
    assert open_image(tmp_path / f"picture.{suffix}").mode == "RGB"


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 32896, dtype=np.uint16)).save(tmp_path / "grey.png")
    assert open_image(tmp_path / "grey.png").getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n then nothing"])
def test_a_file_that_is_no_picture_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.png"):
        open_image(tmp_path / "bad.png")


def test_a_truncated_jpeg_is_refused(tmp_path: Path) -> None:
    noise(64, 64).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"cut\.jpg"):
        open_image(tmp_path / "cut.jpg")


def test_a_missing_picture_is_named() -> None:
    with pytest.raises(InputError, match="there is no such file"):
        open_image(Path("nowhere.png"))


def test_a_picture_outlives_its_file(tmp_path: Path) -> None:
    path, picture = tmp_path / "mapped.bmp", noise(64, 64)  # Pillow maps such a file into memory
    picture.save(path)
    opened = open_image(path)
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert opened.tobytes() == picture.tobytes()


def test_a_large_jpeg_may_be_decoded_at_a_fraction(tmp_path: Path) -> None:
    coarse = noise(8, 6).resize((800, 600))
    for name in ("photo.jpg", "drawing.png"):
        coarse.save(tmp_path / name)
    whole = open_image(tmp_path / "photo.jpg")
    quick = open_image(tmp_path / "photo.jpg", at_least=128)
    assert (whole.size, quick.size) == ((800, 600), (200, 150))
    assert open_image(tmp_path / "photo.jpg", at_least=301).size == (800, 600)
    assert open_image(tmp_path / "drawing.png", at_least=128).size == (800, 600)
    difference = np.asarray(whole.resize((64, 48)), dtype=float) - np.asarray(quick.resize((64, 48)), dtype=float)
    assert np.abs(difference).mean() < 3
