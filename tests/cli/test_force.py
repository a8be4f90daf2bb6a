"""A bundle whose INT8 this processor gets wrong is used by force alone, whatever uses it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import VNNI_ALONE, CommandLine, rewrite

import clip_rd_edge as edge
from clip_rd_edge.errors import UsageError


@pytest.fixture
def wrong(colour_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle for processors with VNNI, and one without it."""
    rewrite(colour_bundle, image=VNNI_ALONE)
    monkeypatch.setattr("clip_rd_edge.runtime.backends.onnxruntime.processor_saturates", lambda: True)
    return colour_bundle


def test_commands_refuse_it(wrong: Path, colour_images: Path, tmp_path: Path, command_line: CommandLine) -> None:
    image, index = colour_images / "red.png", tmp_path / "index"
    for arguments in (
        ["classify", wrong, image, "--labels", "red", "blue"],
        ["index", wrong, colour_images, "-o", index],
        ["search", index, image],
    ):
        code, output, error = command_line(*arguments)
        assert (code, output) == (2, ""), arguments
        assert "gives wrong answers here" in error
        assert "--force" in error
        code, output, _ = command_line(*arguments, "--force")
        assert code == 0, arguments
        assert output


def test_servers_refuse_it(wrong: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = list[object]()
    monkeypatch.setattr("clip_rd_edge.serving.server.run_server", lambda app, **options: served.append(app))
    for serve in (edge.serve, edge.demo):
        with pytest.raises(UsageError, match="gives wrong answers here"):
            serve(wrong)
        assert not served
        serve(wrong, force=True)
        assert served.pop()
