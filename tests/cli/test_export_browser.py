from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support import VNNI_ALONE, CommandLine, rewrite
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from clip_rd_edge.bundle.labels import read_labels
from clip_rd_edge.bundle.manifest import read_manifest, write_manifest
from clip_rd_edge.exporting.layouts import browser


def test_a_bundle_is_exported_as_a_browser_page(
    command_line: CommandLine, colour_bundle: Path, node_modules: Path, tmp_path: Path
) -> None:
    for name in ("notes.txt", ".DS_Store", "image.engine"):
        (colour_bundle / name).write_text("private")
    (tmp_path / "labels.txt").write_text("red\nblue\n")
    site = tmp_path / "site"
    options = ("--target", "browser", "--node-modules", node_modules, "-o", site)
    code, output, error = command_line("export", colour_bundle, "--labels", tmp_path / "labels.txt", *options)
    assert (code, output) == (0, f"{site}\n"), error
    bank = read_labels(site / "bundle")
    assert bank is not None
    assert bank.names == ("red", "blue")
    assert read_labels(colour_bundle) is None
    assert command_line("verify", site / "bundle")[0] == 0
    names = {path.name for path in (site / "bundle").iterdir()}
    assert names == {"manifest.json", "image.onnx", "text.onnx", "tokenizer.json", "labels.npz"}
    page = (site / "index.html").read_text()
    assert "Content-Security-Policy" in page
    assert "import { Model }" in (site / "worker.js").read_text()
    assert "Worker" in (site / "api.js").read_text()  # not the api.js that sends requests to a server
    assert {path.name for path in (site / "npm").iterdir()} == {
        name for package in browser.PACKAGES for name in package.files
    }
    sizes = json.loads((site / "sizes.json").read_text())
    assert sizes["loaded"] == sizes["bundle"] == sum(path.stat().st_size for path in (site / "bundle").iterdir())
    code, _, error = command_line("export", colour_bundle, *options)
    assert (code, "--force" in error) == (2, True)


def test_bundles_that_a_browser_cannot_run_are_refused(
    command_line: CommandLine, colour_bundle: Path, node_modules: Path, tmp_path: Path
) -> None:
    for number, (changes, message) in enumerate(
        (
            ({"target": "openvino"}, "it is for openvino"),
            ({"image": {"preprocesses": True}}, "preprocesses images in its graph"),
            ({"text": VNNI_ALONE}, "its INT8 is for processors"),
            ({}, "WordLevel"),
        )
    ):
        bundle = shutil.copytree(colour_bundle, tmp_path / str(number))
        if not changes:
            Tokenizer(WordLevel({"?": 1}, unk_token="?")).save(str(bundle / "tokenizer.json"))
        rewrite(bundle, **changes)
        options = ("--target", "browser", "--node-modules", node_modules, "-o", tmp_path / "site")
        code, _, error = command_line("export", bundle, *options)
        assert (code, message in error) == (2, True)


@pytest.mark.parametrize(
    ("labels", "name", "word"),
    [((), "image.onnx", b"mean"), (("--labels", "red", "blue"), "manifest.json", b"colours")],
)
def test_a_damaged_bundle_is_not_published(
    command_line: CommandLine,
    colour_bundle: Path,
    node_modules: Path,
    tmp_path: Path,
    labels: tuple[str, ...],
    name: str,
    word: bytes,
) -> None:
    content = (colour_bundle / name).read_bytes()
    (colour_bundle / name).write_bytes(content.replace(word, word.upper()))
    options = ("--target", "browser", "--node-modules", node_modules, "-o", tmp_path / "site")
    assert command_line("export", colour_bundle, *labels, *options)[0] == 2
    assert not (tmp_path / "site").exists()


def test_a_bundle_that_only_embeds_images_becomes_no_page(
    command_line: CommandLine, colours_without_text: Path, node_modules: Path, tmp_path: Path
) -> None:
    options = ("--target", "browser", "--node-modules", node_modules, "-o", tmp_path / "site")
    assert command_line("export", colours_without_text, *options)[0] == 0
    manifest = read_manifest(colours_without_text)
    (colours_without_text / "labels.npz").unlink()
    write_manifest(colours_without_text, manifest)
    code, _, error = command_line("export", colours_without_text, *options, "--force")
    assert (code, "has no text tower and no labels" in error) == (2, True)


def test_labels_that_this_processor_embeds_wrongly_are_not_published(
    command_line: CommandLine, colour_bundle: Path, node_modules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(colour_bundle, text={"instruction_sets": (browser.WASM,)})
    monkeypatch.setattr("clip_rd_edge.runtime.backends.onnxruntime.wrong_sums", lambda: "wrong sums")
    options = ("--target", "browser", "--node-modules", node_modules, "-o", tmp_path / "site")
    code, _, error = command_line("export", colour_bundle, "--labels", "red", "blue", *options)
    assert (code, "gives wrong answers here" in error) == (2, True)
    assert not (tmp_path / "site").exists()
