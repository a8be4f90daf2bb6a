from __future__ import annotations

import json
from pathlib import Path

import pytest

from clip_rd_edge.errors import install_command, pip, upgrade_hint

GIT = {"url": "https://host/all.git", "vcs_info": {"vcs": "git", "commit_id": "1a"}, "subdirectory": "edge"}


class _Installed:
    def __init__(self, direct_url: object) -> None:
        self._direct_url = direct_url

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self._direct_url is None else json.dumps(self._direct_url)


@pytest.mark.parametrize(
    ("direct_url", "command", "upgrade"),
    [
        (None, "pip install 'clip-rd-edge[train]'", "pip install -U clip-rd-edge"),
        (
            {"url": "file:///home/a%20b/clone", "dir_info": {"editable": True}},
            "pip install -e '/home/a b/clone[train]'",
            "git pull in /home/a b/clone, then install it again",
        ),
        (
            GIT,
            "pip install 'clip-rd-edge[train] @ git+https://host/all.git@1a#subdirectory=edge'",
            "pip install -U 'clip-rd-edge @ git+https://host/all.git#subdirectory=edge'",
        ),
    ],
)
def test_the_hints_work_from_where_the_package_came_from(
    direct_url: object, command: str, upgrade: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: _Installed(direct_url))
    assert install_command("train") == command
    assert upgrade_hint() == upgrade


def test_the_commands_are_those_of_the_tool_that_made_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `uv tool install` made, pip does not find, and uv removes extras that are not named."""
    environment = tmp_path / "my tools" / "clip-rd-edge"
    environment.mkdir(parents=True)
    ours = '{ name = "clip-rd-edge", extras = ["camera", "serve"], path = "/wheels/a.whl" }'
    (environment / "uv-receipt.toml").write_text(f"[tool]\nrequirements = [\n    {ours},\n]\n")
    source = {"url": GIT["url"], "vcs_info": GIT["vcs_info"]}
    monkeypatch.setattr("sys.prefix", str(environment))
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: _Installed(source))
    url = "git+https://host/all.git@1a"
    assert install_command("demo") == f"uv tool install 'clip-rd-edge[camera,serve,demo] @ {url}'"
    assert upgrade_hint() == "uv tool upgrade clip-rd-edge"
    assert pip("uninstall") == f"uv pip uninstall -p '{environment}'"
