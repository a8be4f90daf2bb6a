"""Image files: open them as upright RGB images, including HEIC if pillow-heif is installed."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL import __version__ as PILLOW

from clip_rd_edge.bundle.preprocess import Box
from clip_rd_edge.errors import ClipRdEdgeError, InputError, in_one_line
from clip_rd_edge.utils.paths import kind_of

# The formats that are read. Pillow knows some thirty more: EPS starts Ghostscript, and others are decoded by code that
# few people use or test. The format is determined by a file's content, whatever its name.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF", "HEIF")
_PLUGINS = ("Jpeg", "Png", "Gif", "Bmp", "Ppm", "WebP", "Tiff", "Avif")  # HEIF comes with pillow-heif
# Background for transparent images: pages and paper are white, and so are the backgrounds of most training images.
BACKGROUND = (255, 255, 255)
# Images with more pixels are refused before decoding, as a protection against decompression bombs. Pillow's own limit.
MAX_PIXELS = 178_956_970
MAX_BATCH_PIXELS = 64_000_000  # decoded at once: 192 MB, while 64 photographs of 12 megapixels take 2.3 GB
# ISO/IEC 23008-12
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


@runtime_checkable
class ImageFile(Protocol):
    """An image file: a Path or a member of a tar. `str()` of it names its location."""

    def read_bytes(self) -> bytes: ...


def open_image(file: ImageFile, *, min_edge: int | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open an image as RGB: first frame, rotated as its EXIF says, transparency on white, scaled to 8 bits.

    Args:
        min_edge: min length of both edges in pixels. A larger JPEG is decoded at 1/2, 1/4 or 1/8 of its size, which is
            many times faster for a photograph, but no longer bit-identical to open_clip. None decodes at full size.
        max_pixels: limit on width × height, at most MAX_PIXELS; checked before decoding.
    """
    with opened_image(file, max_pixels) as image:
        if min_edge is not None:
            image.draft("RGB", (min_edge, min_edge))
        return to_rgb(image)


def open_to_crop(
    file: ImageFile, draw: Callable[[tuple[int, int]], Box], *, min_edge: int | None
) -> tuple[Image.Image, Box]:
    """Open an image as `open_image` does, to be cropped; return the image, and the box in its pixels.

    Args:
        draw: returns the box to crop in an image of this width and height.
        min_edge: min length of both edges of the crop. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size as long as its
            crop has that many pixels; images in other formats are the same as without. None decodes at full size.
    """
    with opened_image(file, MAX_PIXELS) as image:
        if min_edge is None or image.format not in _JPEGS:
            rgb = to_rgb(image)
            return rgb, draw(rgb.size)
        width, height = image.size
        box = draw((height, width) if _orientation(image) in _SIDEWAYS else (width, height))
        shrink = int(min(box[2] - box[0], box[3] - box[1])) // min_edge
        # Pillow chooses the fraction, and returns the exact size, of which it rounds up the number of pixels.
        reduced = image.draft("RGB", (width // shrink, height // shrink)) if shrink > 1 else None
        scale = reduced[1][2] / width if reduced else 1.0
        return to_rgb(image), (box[0] * scale, box[1] * scale, box[2] * scale, box[3] * scale)


def require_image(path: Path) -> None:
    """Raise InputError if the first bytes of a file show that `open_image` would; the rest is not read."""
    with opened_image(path, MAX_PIXELS):
        pass


@contextlib.contextmanager
def opened_image(file: ImageFile, max_pixels: int) -> Iterator[Image.Image]:
    """Yield an image that is still to be decoded; errors, of the block too, are those of `open_image`."""
    try:
        with _open(file) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(f"it has {image.width} × {image.height} pixels; the limit is {max_pixels:,}")
            _require_decodable(image)
            yield image
    except ClipRdEdgeError:  # of a shard that cannot be fetched
        raise
    except Exception as error:  # decoders raise anything for a damaged file, from IndexError to struct.error
        hint = "convert it to an 8-bit JPEG or PNG, or leave it out"
        if isinstance(error, FileNotFoundError):
            hint = "check the path; only shells expand a pattern or ~: glob.glob(…), Path(…).expanduser()"
        raise InputError(f"Cannot read the image {file}: {_reason(error)}.", hint=hint) from error


DANGLING = "it is a link to something that does not exist"
DANGLING_HINT = "mount the disk that it leads to, or remove the link"


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more pixels than the limit of {MAX_PIXELS:,}"
    if isinstance(error, MemoryError):
        return "there is not enough memory to decode it"
    if isinstance(error, FileNotFoundError):
        is_link = isinstance(error.filename, str | os.PathLike) and Path(error.filename).is_symlink()
        return DANGLING if is_link else "the file does not exist"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, OSError | SyntaxError | ValueError):
        return in_one_line(error)
    return f"its content is damaged ({type(error).__name__} in the decoder)"


def _open(file: ImageFile) -> Image.Image:
    if isinstance(file, Path):
        # Opening a named pipe could wait forever, and reading a device need not end.
        if not stat.S_ISREG(mode := file.stat().st_mode):
            raise ValueError(f"it is not a regular file, but {kind_of(mode)}")
        source: Path | io.BytesIO = file  # of which Pillow reads the header first
    else:
        source = io.BytesIO(file.read_bytes())
    try:
        return Image.open(source, formats=_registered_formats())
    except UnidentifiedImageError:
        with source.open("rb") if isinstance(source, Path) else io.BytesIO(source.getvalue()) as content:
            header = content.read(12)
        if header[4:8] != b"ftyp" or header[8:12] not in _HEIC_BRANDS:
            raise ValueError(_unidentified(header)) from None
        try:
            import pillow_heif
        except ImportError:
            raise ValueError("it is HEIC, which needs a package: pip install pillow-heif") from None
        pillow_heif.register_heif_opener()
        return Image.open(source, formats=_registered_formats())


def _unidentified(header: bytes) -> str:
    if not header:
        return "it is empty"
    if header[4:12] in (b"ftypavif", b"ftypavis") and "AVIF" not in Image.OPEN:
        return f'it is AVIF, which this Pillow, {PILLOW}, does not read: pip install "pillow>=11.3"'
    return f"it is in none of the formats {', '.join(FORMATS)}, or damaged"


def _registered_formats() -> list[str]:
    _register_formats()
    return [name for name in FORMATS if name in Image.OPEN]


@functools.cache
def _register_formats() -> None:
    """Register FORMATS with Pillow; for one that is not registered, `Image.open` would import every plugin it has."""
    for name in _PLUGINS:
        with contextlib.suppress(ImportError):  # AVIF is part of Pillow from 11.3 on
            importlib.import_module(f"PIL.{name}ImagePlugin")


def _require_decodable(image: Image.Image) -> None:
    """Raise ValueError for an uncompressed TIFF whose planes Pillow reads as of 8 bits although they have 16."""
    tags = getattr(image, "tag_v2", {})
    if (
        tags.get(_TIFF_PLANES) == 2
        and len(image.getbands()) > 1
        and image.info.get("compression") == "raw"
        and (bits := max(tags.get(_TIFF_BITS_PER_SAMPLE, (1,)))) > 8
    ):
        raise ValueError(
            f"it has {bits} bits per channel in separate planes, which this Pillow, {PILLOW}, does not decode"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any PIL image to decoded, upright RGB, as `open_image` does."""
    image.load()  # in PNG files, EXIF comes after the pixels
    tags = getattr(image, "tag_v2", {})
    is_12_bits = tags.get(_TIFF_BITS_PER_SAMPLE) == (12,)
    # Pillow inverts images of up to 8 bits whose zero is white.
    is_negative = image.mode.startswith("I;16") and tags.get(_TIFF_PHOTOMETRIC) == 0
    frame = getattr(image, "dispose_extent", None) if image.format == "GIF" and image.tell() == 0 else None
    if frame not in (None, (0, 0, *image.size)):
        # The rest of the canvas is transparent; Pillow gives it the first colour of the palette.
        canvas = Image.new("RGBA", image.size)
        canvas.paste(image.convert("RGBA").crop(frame), frame)
        image = canvas
    # ImageOps.exif_transpose writes all of the EXIF data anew, which fails if any of it is odd.
    if (turn := _TURNS.get(_orientation(image))) is not None:
        image = image.transpose(turn)
        for key in _EXIF:  # of the turned image alone: whoever converts it again must not turn it again
            image.info.pop(key, None)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _to_8_bits(image, is_12_bits=is_12_bits)
        if is_negative:
            image = ImageOps.invert(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        image = Image.alpha_composite(background, image)
    # convert copies RGB images too; a read-only one is memory-mapped from its file and must be copied.
    return image if image.mode == "RGB" and not image.readonly else image.convert("RGB")


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_SIDEWAYS = (5, 6, 7, 8)
_JPEGS = ("JPEG", "MPO")  # the latter of cameras with several images in a file


def _orientation(image: Image.Image) -> int:
    """Return how an image is to be turned, as EXIF says: 1 to 8, or anything else; 1 without readable EXIF data."""
    # Where EXIF has none, Pillow takes that of XMP, by which no browser turns an image; open_clip turns none at all.
    xmp = {key: image.info.pop(key) for key in _XMP if key in image.info}
    try:
        orientation: int = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 — Pillow raises many types for a damaged block in a PNG or WebP file
        return 1
    finally:
        image.info.update(xmp)
    return orientation


# Names in `Image.info`, of PNG and of all formats.
_EXIF = ("Raw profile type exif", "exif")
_XMP = ("XML:com.adobe.xmp", "xmp")


def _to_8_bits(image: Image.Image, *, is_12_bits: bool) -> Image.Image:
    """Scale greyscale of more than 8 bits, which Pillow would clip at 255, with its transparent level on BACKGROUND.

    Integers are levels of 16 bits, unless none is above 255; floats are shares, unless one is above 1.
    """
    values = np.asarray(image, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    narrow, wide = (1.0, 255.0) if image.mode == "F" else (255.0, 4095.0 if is_12_bits else 65535.0)
    top = narrow if high <= narrow * (1 + _OVERSHOOT) else wide
    # NaN compares as false.
    if not (low >= -top * _OVERSHOOT and high <= top * (1 + _OVERSHOOT) and (top == narrow or high > wide / 16)):
        raise ValueError(
            f"its values range from {low:g} to {high:g}; expected a range from 0 to {narrow:g} or to {wide:g}"
        )
    levels = (values * (255 / top)).round().clip(0, 255).astype(np.uint8)
    if isinstance(transparent := image.info.get("transparency"), int):  # of PNG: one of its levels
        levels[values == transparent] = BACKGROUND[0]
    return Image.fromarray(levels)


_TIFF_BITS_PER_SAMPLE, _TIFF_PHOTOMETRIC, _TIFF_PLANES = 258, 262, 284
_OVERSHOOT = 1 / 512  # half a level of 8 bits, such as interpolation causes


# Accepted forms of an image: a file's path, a PIL image of any mode, or a uint8 array of shape (H, W), (H, W, 3) or
# (H, W, 4).
ImageInput = str | os.PathLike[str] | Image.Image | npt.NDArray[Any]


def as_rgb(image: ImageInput) -> Image.Image:
    """Convert any `ImageInput` to an RGB image, as `open_image` converts a file."""
    if isinstance(image, str | os.PathLike):
        return open_image(Path(image))
    if isinstance(image, np.ndarray):
        is_known = image.dtype == np.uint8 and image.ndim in (2, 3) and image.shape[2:] in ((), (3,), (4,))
        image = Image.fromarray(image) if is_known and image.size else image
    if not isinstance(image, Image.Image):
        kind = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        hint = "pass one of its columns, such as list(table['filepath'])" if is_table(image) else ""
        if _is_encoded(image):
            hint = "open it with PIL.Image.open(file), or bytes with PIL.Image.open(io.BytesIO(content))"
        raise InputError(
            f"An image is {kind}; expected a path, a PIL image, a uint8 array of shape (H, W), (H, W, 3) or (H, W, 4) "
            "with the channels red, green, blue and alpha, or a list of them.",
            hint=hint,
        )
    try:
        if 0 in image.size:
            raise ValueError(f"it has {image.width} × {image.height} pixels")
        _require_decodable(image)
        return to_rgb(image)
    except Exception as error:  # it may be closed, or its file damaged
        raise InputError(
            f"An image of mode {image.mode} cannot be read: {_reason(error)}.",
            hint="convert it to 8 bits per channel, such as RGB, or leave it out",
        ) from error


def _is_encoded(given: object) -> bool:
    """Return whether this is the content of a file, or an open file, and not a camera of OpenCV, which also reads."""
    is_file = hasattr(given, "read") and hasattr(given, "seek") and not isinstance(given, io.TextIOBase)
    return is_file or isinstance(given, bytes | bytearray | memoryview)


def as_images(images: ImageInput | Iterable[ImageInput]) -> Iterable[ImageInput]:
    """Return images as they are, and a single one, or what `as_rgb` refuses, in a list."""
    is_list = isinstance(images, Iterable) and not (_is_encoded(images) or is_table(images))
    return images if is_list and not is_single_image(images) else [images]  # type: ignore[return-value,list-item]


def is_table(given: object) -> bool:
    """Return whether an argument is a table, such as a DataFrame: iterating it yields the names of its columns."""
    return hasattr(given, "columns")


def in_bounded_batches(images: Iterable[Image.Image], count: int) -> Iterator[list[Image.Image]]:
    """Yield images in batches of at most `count`, and of fewer if they are large: what is decoded takes memory."""
    batch, pixels = list[Image.Image](), 0
    for image in images:
        batch.append(image)
        pixels += image.width * image.height
        if len(batch) == count or pixels >= MAX_BATCH_PIXELS:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch


def is_single_image(images: ImageInput | Iterable[ImageInput]) -> bool:
    """Return whether `images` is a single image; a four-dimensional array is a batch, and one of texts a list."""
    if isinstance(images, np.ndarray):
        return images.ndim < 4 and not (images.ndim == 1 and images.dtype.kind in "OUT")
    return isinstance(images, str | os.PathLike | Image.Image)
