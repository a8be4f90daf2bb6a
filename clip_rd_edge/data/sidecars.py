"""What a sample of a shard has beside its picture, read as text: captions, and classes' numbers."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from clip_rd_edge.data.tars import TarMember
from clip_rd_edge.errors import InputError, near_matches


def text_captions(member: TarMember) -> tuple[str, ...]:
    """The caption of a .txt, lines and all, as open_clip takes it.

    Raises:
        InputError: it is empty, or no UTF-8.
    """
    return _said([read_text(member)], str(member))


def json_captions(member: TarMember, key: str) -> tuple[str, ...]:
    """The captions at a key of a .json: a text or a list of texts.

    Raises:
        InputError: no such key, no text there, or no JSON.
    """
    try:
        content = msgspec.json.decode(read_text(member))
    except msgspec.DecodeError as error:
        raise InputError(f"{member} is not valid JSON: {error}.") from error
    if not isinstance(content, dict) or key not in content:
        known = [str(name) for name in content] if isinstance(content, dict) else []
        raise InputError(f"{member} has no key {key!r}.{near_matches(key, known)}", hint="name it: --json-caption-key")
    value = content[key]
    captions = value if isinstance(value, list) else [value]
    if not all(isinstance(caption, str) for caption in captions):
        raise InputError(f"{member}: {key!r} is neither a text nor a list of texts.")
    return _said(captions, str(member))


def _said(captions: Sequence[str], place: str) -> tuple[str, ...]:
    said = tuple(stripped for caption in captions if (stripped := caption.strip()))
    if not said:
        raise InputError(f"{place}: the caption is empty.")
    return said


def read_text(member: TarMember) -> str:
    """A member's content as UTF-8; raises InputError where it is none or cannot be read."""
    try:
        return member.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Cannot read {member}: {error}.") from error
