"""How to install this package with an extra, or a newer one, from where it came from: a clone, a URL, or an index."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGE = "clip-rd-edge"
_CLONE = Path(__file__).resolve().parents[1]
# What `uv tool install` and `pipx install` leave in the environment that they make for a package and its commands.
_UV_TOOL, _PIPX = "uv-receipt.toml", "pipx_metadata.json"


def install_command(extra: str) -> str:
    """Return the command that installs this package with an extra, such as `train`, as it works on this machine."""
    origin = _origin()
    extras = ",".join(dict.fromkeys([*_extras_of_tool(), *extra.split(",")]))
    editable = ""
    if "dir_info" in origin:
        editable = "-e " if origin["dir_info"].get("editable") else ""
        requirement = f"{_folder(origin)}[{extras}]"
    else:
        # The commit, since a branch may have moved on: the extras of other code, or other code, would be installed.
        requirement = f"{PACKAGE}[{extras}]{_source(origin, origin.get('vcs_info', {}).get('commit_id'))}"
    install = "uv tool install" if _is_made_by(_UV_TOOL) else "pipx install --force"
    if not _is_made_by(_UV_TOOL, _PIPX):
        install = pip("install")
    return f"{install} {editable}{_quoted(requirement)}"


def upgrade_hint() -> str:
    """Return what to do for a newer version: a command, or words where that would install the same files again."""
    origin = _origin()
    if "dir_info" in origin:
        return f"git pull in {_folder(origin)}, then install it again"
    if "archive_info" in origin:
        return f"install a newer {PACKAGE}: this one is from {origin['url']}"
    if _is_made_by(_UV_TOOL, _PIPX):
        return f"{'uv tool' if _is_made_by(_UV_TOOL) else 'pipx'} upgrade {PACKAGE}"
    return f"{pip('install')} -U {_quoted(PACKAGE + _source(origin))}"


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

    if _is_made_by(_PIPX):
        return f"pipx runpip {Path(sys.prefix).name} {action}"
    if _is_made_by(_UV_TOOL):
        return f"uv pip {action} -p {_quoted(sys.prefix)}"
    # An environment of uv has no pip, and one that the shell finds elsewhere would install into another Python.
    return f"pip {action}" if find_spec("pip") else f"uv pip {action}"


def _is_made_by(*records: str) -> bool:
    return any((Path(sys.prefix) / record).is_file() for record in records)


def _extras_of_tool() -> list[str]:
    """Return the extras that `uv tool install` was given: if given others, it removes the packages of these."""
    if not _is_made_by(_UV_TOOL):
        return []
    receipt = (Path(sys.prefix) / _UV_TOOL).read_text(encoding="utf-8")
    # Its entry for the package, whose extras come after the name; Python 3.10 reads no TOML.
    match = re.search(rf'name = "{PACKAGE}", extras = \[([^]]*)\]', receipt)
    return re.findall(r'"([^"]+)"', match[1]) if match else []


def _quoted(argument: str) -> str:
    import shlex  # this import and that of `pip` take 20 ms, and most processes need no install command

    return f'"{argument}"' if os.name == "nt" else shlex.quote(argument)


def _folder(origin: dict[str, Any]) -> str:
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    return url2pathname(urlsplit(origin["url"]).path)


def _source(origin: dict[str, Any], commit: str | None = None) -> str:
    """Return the part of a requirement after the name; empty for an index."""
    if not origin:
        return ""
    version_control = origin.get("vcs_info", {}).get("vcs")
    scheme = f"{version_control}+" if version_control else ""
    revision = f"@{commit}" if commit else ""
    folder = f"#subdirectory={origin['subdirectory']}" if "subdirectory" in origin else ""
    return f" @ {scheme}{origin['url']}{revision}{folder}"


def _origin() -> dict[str, Any]:
    """Return what pip recorded of where this package came from (PEP 610), or an empty dict for an index."""
    import json
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        recorded = distribution(PACKAGE).read_text("direct_url.json")
    except PackageNotFoundError:  # a clone on Python's path
        return {"url": _CLONE.as_uri(), "dir_info": {}}
    return dict(json.loads(recorded)) if recorded else {}
