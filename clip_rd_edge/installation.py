"""The command that installs this package with an extra, from where it was installed: a clone, a URL, or an index."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

PACKAGE = "clip-rd-edge"
_CLONE = Path(__file__).resolve().parents[1]


def install_command(extra: str = "", *, options: str = "") -> str:
    """Return the pip command that installs this package with an extra, as it works on this machine.

    pip records where a package came from, unless it was an index (PEP 610, `direct_url.json`).

    Args:
        extra: such as `train`; empty for none.
        options: options of `pip install`, such as `-U`.
    """
    import shlex  # these imports take 20 ms, and most processes need no install command
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    suffix = f"[{extra}]" if extra else ""
    origin = _origin()
    if not origin:
        requirement = f"{PACKAGE}{suffix}"
    elif "dir_info" in origin:
        options = f"{options} -e" if origin["dir_info"].get("editable") else options
        requirement = f"{url2pathname(urlsplit(origin['url']).path)}{suffix}"
    else:
        version_control = origin.get("vcs_info", {}).get("vcs")
        requirement = f"{PACKAGE}{suffix} @ {version_control + '+' if version_control else ''}{origin['url']}"
    quoted = f'"{requirement}"' if os.name == "nt" else shlex.quote(requirement)
    return " ".join(["pip install", *options.split(), quoted])


def _origin() -> dict[str, Any]:
    """Return the content of direct_url.json, or an empty dict if an index was the origin."""
    import json
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        recorded = distribution(PACKAGE).read_text("direct_url.json")
    except PackageNotFoundError:  # a clone on Python's path
        return {"url": _CLONE.as_uri(), "dir_info": {}}
    return dict(json.loads(recorded)) if recorded else {}
