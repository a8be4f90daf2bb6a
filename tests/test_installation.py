from __future__ import annotations

import json

import pytest

from clip_rd_edge.errors import install_command

GIT = {"url": "https://host/all.git", "vcs_info": {"vcs": "git", "commit_id": "1a"}, "subdirectory": "edge"}


class _Installed:
    def __init__(self, direct_url: object) -> None:
        self._direct_url = direct_url

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self._direct_url is None else json.dumps(self._direct_url)


@pytest.mark.parametrize(
    ("direct_url", "command"),
    [
        (None, "pip install 'clip-rd-edge[train]'"),
        (
            {"url": "file:///home/a%20b/clone", "dir_info": {"editable": True}},
            "pip install -e '/home/a b/clone[train]'",
        ),
        (GIT, "pip install 'clip-rd-edge[train] @ git+https://host/all.git@1a#subdirectory=edge'"),
    ],
)
def test_the_hint_works_from_where_the_package_came_from(
    direct_url: object, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: _Installed(direct_url))
    assert install_command("train") == command
