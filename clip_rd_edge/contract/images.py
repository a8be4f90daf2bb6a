"""Image files: find them, open them as upright RGB, and read HEIC where pillow-heif is installed."""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from clip_rd_edge.errors import InputError

# What a transparent picture is laid on; page and paper are white, and so are most training pictures' grounds.
BACKGROUND = (255, 255, 255)
# Refused above this many pixels before anything is decoded, against decompression bombs.
MAX_PIXELS = 200_000_000
HEADER_BYTES = 12
_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


@runtime_checkable
class ImageFile(Protocol):
    """A picture's file, wherever it lies: a Path, or a member of a tar. As a string it names its place."""

    def read_bytes(self) -> bytes:
        """The file's content."""
        ...


def open_image(picture: ImageFile, *, at_least: int | None = None) -> Image.Image:
    """Open a picture as RGB: turned as its EXIF says, first frame, transparency laid on white, 16 bits scaled to 8.

    Args:
        at_least: pixels that both edges shall keep. A greater JPEG is decoded at 1/2, 1/4 or 1/8, which is many times
            faster for a photograph, and no longer equal to open_clip's bit for bit. None decodes all of it.

    Raises:
        InputError: no such file, not a picture, damaged, or of more than MAX_PIXELS.
    """
    try:
        with _opened(picture) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(
                    f"{picture} has {image.width} × {image.height} pixels; at most {MAX_PIXELS:,} are read.",
                    hint="make it smaller first",
                )
            if at_least is not None:
                image.draft("RGB", (at_least, at_least))
            return to_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error)
        if isinstance(error, FileNotFoundError):
            reason = "there is no such file"
        elif isinstance(error, UnidentifiedImageError):
            reason = "it is in no format that Pillow knows"  # Pillow's own words name an object in memory
        raise InputError(f"Cannot read the picture {picture}: {reason}.") from error


def _opened(picture: ImageFile) -> Image.Image:
    # Pillow reads a Path's header first, so that a file of the wrong kind is not read to its end.
    file = picture if isinstance(picture, Path) else io.BytesIO(picture.read_bytes())
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        with picture.open("rb") if isinstance(picture, Path) else io.BytesIO(picture.read_bytes()) as content:
            if not is_heic(content.read(HEADER_BYTES)):
                raise
        teach_pillow(picture)
        return Image.open(file)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as RGB, decoded and upright; see `open_image`."""
    image.load()  # PNG has its EXIF behind the pixels
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)  # copies a picture that is upright, too
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow clips 16-bit grey at 255 when it converts: scale instead.
        image = Image.fromarray((np.asarray(image, dtype=np.float32) / 257.0).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        image = Image.alpha_composite(ground, image)
    # convert copies an RGB picture, too; one that Pillow maps from its file must not outlive that.
    return image if image.mode == "RGB" and not image.readonly else image.convert("RGB")


# What callers may give for an image: a file's path, a PIL image of any mode, or an array of bytes, (H, W), (H, W, 3) or
# (H, W, 4).
ImageInput = str | os.PathLike[str] | Image.Image | npt.NDArray[Any]


def as_rgb(image: ImageInput) -> Image.Image:
    """An image in any of the forms of `ImageInput` as RGB, converted as `open_image` converts a file.

    Raises:
        InputError: a path as `open_image`; an array of another shape or type; something else.
    """
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, str | os.PathLike):
        return open_image(Path(image))
    if not isinstance(image, np.ndarray):
        raise InputError(f"An image is a {type(image).__name__}; expected a path, a PIL image or a numpy array.")
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
        raise InputError(
            f"An image is an array of shape {image.shape} and type {image.dtype}; expected bytes (uint8) of shape "
            "(H, W), (H, W, 3) or (H, W, 4), in the order red, green, blue, alpha."
        )
    return to_rgb(Image.fromarray(image))


def is_one_image(images: ImageInput | Sequence[ImageInput]) -> bool:
    """Whether `images` is one image and not several: an array of four dimensions is a batch."""
    if isinstance(images, np.ndarray):
        return images.ndim < 4
    return isinstance(images, str | os.PathLike | Image.Image)


def is_heic(header: bytes) -> bool:
    """Whether a file that begins with these HEADER_BYTES is HEIC (ISO/IEC 23008-12)."""
    return header[4:8] == b"ftyp" and header[8:12] in _BRANDS


def teach_pillow(picture: object) -> None:
    """Have Pillow read HEIC from now on, in this process.

    Args:
        picture: that was met, for the message.

    Raises:
        InputError: pillow-heif is not installed.
    """
    try:
        import pillow_heif
    except ImportError as error:
        raise InputError(
            f"Cannot read the picture {picture}: it is HEIC, which Pillow reads with the package pillow-heif only.",
            hint="pip install pillow-heif, or save it as JPEG",
        ) from error
    pillow_heif.register_heif_opener()


# By which a folder's pictures are told from other files. What Pillow cannot open of them is reported when it is met.
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"}
FROM_LIST = "-"


def find_images(names: Iterable[str], *, listed: Iterable[str] = ()) -> Iterator[Path]:
    """The pictures that are meant by each name, in the order of the names; folders and globs are sorted.

    Args:
        names: files, folders (searched through), globs such as `photos/**/*.jpg`, which some shells leave to the
            program, and `-` for `listed`.
        listed: lines with a path each, such as sys.stdin.

    Raises:
        InputError: a file or folder is not there, a folder has no pictures, or a glob matches nothing.
    """
    for name in names:
        path = Path(name)
        if name == FROM_LIST:
            yield from (Path(line.rstrip("\r\n")) for line in listed if line.strip())
        elif path.is_dir():
            yield from _found(images_below(path), f"The folder {path} has no pictures.")
        elif path.exists():
            yield path
        elif glob.has_magic(name):
            # Path.glob takes no absolute pattern.
            matches = (Path(match) for match in sorted(glob.glob(name, recursive=True)))  # noqa: PTH207
            yield from _found((match for match in matches if match.is_file()), f"No picture matches {name}.")
        else:
            raise InputError(f"There is no picture or folder {name}.", hint="check the path")


def images_below(folder: Path) -> list[Path]:
    """Every picture in a folder and its sub-folders, sorted; hidden files, folders and their contents are left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def _found(paths: Iterable[Path], otherwise: str) -> Iterator[Path]:
    none = True
    for path in paths:
        none = False
        yield path
    if none:
        raise InputError(otherwise)
