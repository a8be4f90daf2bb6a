"""A bundle whose INT8 this processor gets wrong is used by force alone, whatever uses it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

import clip_rd_edge as edge
from clip_rd_edge.bundle.manifest import read_manifest, write_manifest
from clip_rd_edge.errors import UsageError

CommandLine = Callable[..., tuple[int, str, str]]


@pytest.fixture
def wrong(colour_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle for processors with VNNI, and one without it."""
    manifest = read_manifest(colour_bundle)
    image = replace(manifest.image, instruction_sets=("x86-64-vnni", "aarch64"))
    write_manifest(colour_bundle, replace(manifest, image=image))
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
