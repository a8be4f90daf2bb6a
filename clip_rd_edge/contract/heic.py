"""HEIC, which iPhones save: Pillow reads it with the package pillow-heif, where that is installed."""

from __future__ import annotations

from clip_rd_edge.errors import InputError

HEADER_BYTES = 12
_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


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
