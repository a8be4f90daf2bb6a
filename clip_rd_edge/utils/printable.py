"""Text of unknown origin, such as the name of a file or a label, in a form that a terminal shows and never obeys."""

from __future__ import annotations

import re

# Control characters but tab and newline: with ESC, a terminal changes its title, its clipboard or what it has shown.
# The others reorder or break the text around them.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\udc80-\udc9f]")


def printable(text: str) -> str:
    """Return `text` with each control character as an escape, such as `\\x1b`."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def is_unicode(text: str) -> bool:
    """Return whether a text is of characters alone: Python also keeps halves of surrogate pairs, as of file names."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_LINE_BREAKS = {
    ord(character): character.encode("unicode_escape").decode() for character in "\n\r\t\v\f\x85\u2028\u2029"
}


def one_line(text: object) -> str:
    """Return a text, such as the path of a file, with line breaks and tabs escaped, so that it stays on its line."""
    return str(text).translate(_LINE_BREAKS)


def inert_cell(text: str) -> str:
    """Return the text, after an apostrophe if a spreadsheet would compute it as a formula (OWASP, CSV injection)."""
    return f"'{text}" if text.lstrip(" ").startswith(("=", "+", "-", "@", "\t", "\r")) else text
