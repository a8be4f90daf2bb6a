"""YAML with a comment on each key, to start a file of one's own from."""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import Any

import msgspec

from clip_rd_edge.utils.structs import to_yaml

_WIDTH = 80  # columns of a comment, as many as a terminal has at least
_ENTRY = re.compile(r"( *)(\w+(?:, \w+)*): (.+)")


def commented_yaml(struct: msgspec.Struct) -> str:
    """Return a struct as YAML in which each key is preceded by what its docstring says about it.

    `read_yaml` reads it back as the same struct. A nested struct is commented, too; one in a list is not.
    """
    return "\n".join(_lines(struct, indent="")) + "\n"


def _lines(struct: msgspec.Struct, *, indent: str) -> list[str]:
    comments = attribute_comments(type(struct))
    lines: list[str] = []
    for field in msgspec.structs.fields(struct):
        value = getattr(struct, field.name)
        if comment := comments.pop(field.name, ""):
            lines += comment_lines(comment, indent=indent)
        if isinstance(value, msgspec.Struct):
            lines += [f"{indent}{field.encode_name}:", *_lines(value, indent=indent + "  ")]
        else:
            entry = to_yaml({field.encode_name: value}, short_lists_inline=isinstance(value, list | tuple))
            lines += [indent + line for line in entry.rstrip("\n").split("\n")]
    return lines


def comment_lines(text: str, *, indent: str = "") -> list[str]:
    """Return a text as the lines of a comment."""
    return textwrap.wrap(
        text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ", break_on_hyphens=False
    )


def attribute_comments(kind: type[Any]) -> dict[str, str]:
    """Return the descriptions in the `Attributes:` of a docstring by name; one for several names is at the first."""
    comments: dict[str, str] = {}
    margin, name = None, ""
    _, _, block = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    for line in block.splitlines():
        entry = _ENTRY.fullmatch(line)
        if entry and (margin is None or entry[1] == margin):
            margin = entry[1]
            name, _, others = entry[2].partition(", ")
            comments[name] = f"{others and entry[2] + ': '}{entry[3]}"
        elif name:
            comments[name] += f" {line.strip()}"
    return {name: comment.replace("`", "").strip() for name, comment in comments.items()}
