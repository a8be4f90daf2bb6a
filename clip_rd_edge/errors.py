"""Exceptions that clip-rd-edge raises deliberately: `ClipRdEdgeError` and its subclasses.

The exit code is 1; 2 for a `UsageError`, which the user can fix; and 75 for an `InterruptedRunError`.

A message states what was wrong, with its value and place, and what was expected; `hint`, what to do next. Both write
an option in braces, as in "set {batch_size} to 64 or less": Python shows `batch_size`, the command line `--batch-size`.
At the end is how this package is installed with an extra, or a newer one, from where it came from.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_CLOSE = 0.65  # difflib's ratio
_MIN_PREFIX = 3  # characters
_MAX_REASON = 300  # characters of another library's message
_ORT_STATUS = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (?:Load model from .*? failed: ?)?")
# File and line, and the function with its parameters, for templates also with their types; on Windows its name alone.
_CPP_PLACE = re.compile(
    r"\S{1,300}\.(?:cc|cpp|cu|h):\d+ "
    r"(?:[\w:<>,&* ]*::~?\w+\((?:[^()]|\([^()]*\))*\)(?: const)?(?: \[with [^]]*\])? |[\w:<>]+::~?\w+ )?"
)
_MAX_MESSAGE = 2_000  # characters: a value in a file, or the path of one, can be of any length


class ClipRdEdgeError(Exception):
    """Base class of all errors of this package.

    Args:
        message: one sentence: what was wrong, with its value and place, and what was expected.
        hint: what to do next, or empty; alternatives are joined by `, or `.
        option: the name of the option that is to be changed, or empty.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", option: str = "") -> None:
        super().__init__(_shortened(message))
        self.advice = _shortened(hint)  # as it was written, for an error that replaces this one
        self.option = option

    def __str__(self) -> str:
        return self.message_for(_as_in_python)

    @property
    def hint(self) -> str:
        """What to do next, with options as Python names them; empty if there is nothing to add."""
        return self.hint_for(_as_in_python)

    def message_for(self, spell: Spell) -> str:
        """Return the message with each option as `spell` names it, or as in Python where `spell` returns None."""
        return spelled(super().__str__(), lambda name: spell(name) or name)

    def hint_for(self, spell: Spell) -> str:
        """Return the hint with each option as `spell` names it, without the ways for whose option it returns None."""
        ways = (spelled(way, spell) for way in self.advice.split(_OR))
        return _OR.join(way for way in ways if not _OPTION.search(way))


Spell = Callable[[str], str | None]
_OR = ", or "
_OPTION = re.compile(r"\{([a-z]+(?:_[a-z]+)*)\}")


def spelled(text: str, spell: Spell) -> str:
    """Return a text with each `{option}` as `spell` names it; an unknown one is left as it is."""
    return _OPTION.sub(lambda match: spell(match[1]) or match[0], text)


def _as_in_python(name: str) -> str:
    return name


def _shortened(text: str) -> str:
    if len(text) <= _MAX_MESSAGE:
        return text
    return f"{text[: _MAX_MESSAGE // 2]} … {text[-_MAX_MESSAGE // 4 :]}"


class DiskFullError(ClipRdEdgeError):
    """There is no space left on a disk."""


class UnreachableError(ClipRdEdgeError):
    """This machine, another one or the network between them failed to deliver data, also when tried again."""


class LostProcessError(ClipRdEdgeError):
    """Another process of a run has ended or cannot be reached, so that this one cannot go on."""


class DivergedRunError(ClipRdEdgeError):
    """Training has diverged: the loss, a weight or an embedding is no longer a finite number."""


class InterruptedRunError(ClipRdEdgeError):
    """A long run was stopped by a signal after its state was saved; its hint is how to resume.

    Exit code 75 is EX_TEMPFAIL: try again.
    """

    exit_code = 75


class UsageError(ClipRdEdgeError):
    """The request cannot be carried out as given; the user can fix it."""

    exit_code = 2


class InputError(UsageError):
    """A file, image, caption or table is missing or invalid."""


class ConfigError(UsageError):
    """A recipe, suite, manifest or model configuration is invalid."""


class NotFiniteError(ConfigError):
    """A model's embeddings are not finite numbers."""


class MissingExtraError(UsageError):
    """A required optional dependency is not installed."""

    def __init__(self, package: str, *, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed.", hint=install_command(extra)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return UsageError, self.args, self.__dict__  # pickle would call this class with the message alone


@contextmanager
def needs_extra(package: str, *, extra: str, purpose: str) -> Iterator[None]:
    """Within the block, a module that is not installed is a MissingExtraError."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(package, extra=extra, purpose=purpose) from error


def with_hint(message: str, hint: str) -> str:
    """Return a message with its hint, for where a hint has no place of its own."""
    return f"{message} Hint: {hint}" if hint else message


def relayed_error(message: str, *, hint: str, exit_code: int) -> ClipRdEdgeError:
    """Return an error of another process or machine, as one that ends this process with the same exit code."""
    kind = UsageError if exit_code == UsageError.exit_code else ClipRdEdgeError
    return kind(message, hint=hint)


def require_known_options(given: Iterable[str], known: Iterable[str], *, command: str) -> None:
    """Raise UsageError if a call was given an option that it does not have: `**options` takes any name.

    Args:
        command: the command that has the same options.
    """
    if unknown := sorted(set(given) - set(known)):
        raise UsageError(f"Unknown {command} option {unknown[0]!r}.{near_matches(unknown[0], known)}")


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, then what it was raised from or raised while handling, and so on back to the first.

    Each once: `raise error from error` makes a ring.
    """
    cause: BaseException | None = error
    seen = set[int]()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def first_line(error: object) -> str:
    """Return the first line of another library's message that is not blank, or else the error's type; no full stop."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__).rstrip(".")


def in_one_line(error: BaseException) -> str:
    """Return another library's message in one line, or else the error's type; no full stop. Drivers write pages.

    What ONNX Runtime writes in front of a reason is left out: its place in the C++ code alone exceeds the limit.
    """
    reason = _CPP_PLACE.sub("", _ORT_STATUS.sub("", " ".join(str(error).split())))
    return reason[:_MAX_REASON].strip(" .") or type(error).__name__


def quoted(text: object) -> str:
    """Return a text of a user, such as a path, in quotes; the backslashes of Windows's paths stay single."""
    return repr(str(text)).replace("\\\\", "\\")


def near_matches(value: str, known: Iterable[str], *, prefix: str = "") -> str:
    """Return ` Did you mean 'a' or 'b'?` with the names closest to `value`, or an empty string if none is close.

    Case is ignored. A name is close if about two thirds of the characters match, or if it begins with `value`.

    Args:
        prefix: what to put before each name, such as the folder of a file.
    """
    names = {name.casefold(): name for name in known}
    folded = value.casefold()
    close = difflib.get_close_matches(folded, names, n=len(names) or 1, cutoff=_CLOSE)
    # Of equally close names the first in the alphabet, so that sizes begin with the smallest.
    close.sort(key=lambda name: (-difflib.SequenceMatcher(None, name, folded).ratio(), name))
    if len(folded) >= _MIN_PREFIX:
        close += [name for name in names if name.startswith(folded)]
    matches = [quoted(prefix + names[name]) for name in dict.fromkeys(close)][:3]
    if not matches:
        return ""
    *others, last = matches
    return f" Did you mean {', '.join(others)}{' or ' if others else ''}{last}?"


PACKAGE = "clip-rd-edge"
_CLONE = Path(__file__).resolve().parents[1]


def install_command(extra: str) -> str:
    """Return the command that installs this package with an extra, such as `train`, as it works on this machine."""
    origin = _origin()
    if "dir_info" in origin:
        editable = "-e " if origin["dir_info"].get("editable") else ""
        return f"{pip('install')} {editable}{_quoted(f'{_folder(origin)}[{extra}]')}"
    return f"{pip('install')} {_quoted(f'{PACKAGE}[{extra}]{_source(origin)}')}"


def without_checkout() -> Callable[[str], str]:
    """Return a function that puts the package's name in place of the folder that it was installed from.

    For files that others read: neither that folder's path nor a command with it means anything to them.
    """
    origin = _origin()
    if "dir_info" not in origin:
        return str
    folder = re.escape(_folder(origin).rstrip("/\\"))
    pattern = re.compile(rf"(?:-e )?(['\"]?)(?<![\w./-]){folder}(?![\w-]|\.\w)")
    return lambda text: pattern.sub(rf"\1{PACKAGE}", text)


def pip(action: str) -> str:
    """Return the beginning of a command of pip, such as `pip install`, as it works in this environment."""
    from importlib.util import find_spec

    if (Path(sys.prefix) / "pipx_metadata.json").is_file():
        return f"pipx runpip {Path(sys.prefix).name} {action}"
    # An environment of uv has no pip, and one that the shell finds elsewhere would install into another Python.
    return f"pip {action}" if find_spec("pip") else f"uv pip {action} -p {_quoted(sys.prefix)}"


def _quoted(argument: str) -> str:
    import shlex  # this import and that of `pip` take 20 ms, and most processes need no install command

    return f'"{argument}"' if os.name == "nt" else shlex.quote(argument)


def _folder(origin: dict[str, Any]) -> str:
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    return url2pathname(urlsplit(origin["url"]).path)


def _source(origin: dict[str, Any]) -> str:
    """Return the part of a requirement after the name; empty for an index."""
    if not origin:
        return ""
    source, folder = origin.get("vcs_info", {}), origin.get("subdirectory")
    # With the commit, since a branch may have moved on: the extras of other code, or other code, would be installed.
    place = f"{source['vcs']}+{origin['url']}@{source['commit_id']}" if source else origin["url"]
    return f" @ {place}{f'#subdirectory={folder}' if folder else ''}"


def _origin() -> dict[str, Any]:
    """Return what pip recorded of where this package came from (PEP 610), or an empty dict for an index."""
    import json
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        recorded = distribution(PACKAGE).read_text("direct_url.json")
    except PackageNotFoundError:  # a clone on Python's path
        return {"url": _CLONE.as_uri(), "dir_info": {}}
    return dict(json.loads(recorded)) if recorded else {}
