from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from clip_rd_edge.errors import install_command, pip, upgrade_hint


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
            {
                "url": "https://host/all.git",
                "vcs_info": {"vcs": "git", "commit_id": "1a", "requested_revision": "v0.1.0"},
                "subdirectory": "edge",
            },
            "pip install 'clip-rd-edge[train] @ git+https://host/all.git@1a#subdirectory=edge'",
            "pip install -U 'clip-rd-edge @ git+https://host/all.git#subdirectory=edge'",
        ),
        (
            {"url": "file:///wheels/a.whl", "archive_info": {}},
            "pip install 'clip-rd-edge[train] @ file:///wheels/a.whl'",
            "install a newer clip-rd-edge: this one is from file:///wheels/a.whl",
        ),
    ],
)
def test_the_hints_work_from_where_the_package_came_from(
    direct_url: object, command: str, upgrade: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: _Installed(direct_url))
    assert install_command("train") == command
    assert upgrade_hint() == upgrade


def test_a_clone_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.distribution", missing)
    assert install_command("demo") == f"pip install '{Path(__file__).resolve().parents[1]}[demo]'"


@pytest.mark.parametrize(
    ("record", "direct_url", "command", "upgrade", "pip_command"),
    [
        (
            "uv-receipt.toml",
            {"url": "https://host/clone.git", "vcs_info": {"vcs": "git", "commit_id": "1a"}},
            "uv tool install 'clip-rd-edge[camera,serve,demo] @ git+https://host/clone.git@1a'",
            "uv tool upgrade clip-rd-edge",
            "uv pip uninstall -p '{}'",
        ),
        (
            "pipx_metadata.json",
            None,
            "pipx install --force 'clip-rd-edge[demo]'",
            "pipx upgrade clip-rd-edge",
            "pipx runpip clip-rd-edge uninstall",
        ),
    ],
)
def test_the_commands_are_those_of_the_tool_that_made_the_environment(
    record: str,
    direct_url: object,
    command: str,
    upgrade: str,
    pip_command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What `uv tool install` or `pipx install` made, pip does not find, and uv removes extras that are not named."""
    environment = tmp_path / "my tools" / "clip-rd-edge"
    environment.mkdir(parents=True)
    ours = '{ name = "clip-rd-edge", extras = ["camera", "serve"], path = "/wheels/a.whl" }'
    others = '{ name = "other", extras = ["none"] }'
    commands = '{ name = "clip-rd-edge", from = "clip-rd-edge" }'
    (environment / record).write_text(
        f"[tool]\nrequirements = [\n    {ours},\n    {others},\n]\nentrypoints = [{commands}]\n"
    )
    monkeypatch.setattr("sys.prefix", str(environment))
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: _Installed(direct_url))
    assert install_command("demo") == command
    assert upgrade_hint() == upgrade
    assert pip("uninstall") == pip_command.format(environment)
