"""A folder that runs a bundle in the browser alone: the demo's page, with onnxruntime-web in place of the server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from clip_rd_edge.contract.bundle import TOKENIZER, Manifest, read_manifest
from clip_rd_edge.contract.label_bank import LABELS
from clip_rd_edge.demo.npm import find_packages
from clip_rd_edge.errors import UsageError
from clip_rd_edge.utils.io import new_folder, refuse_unless_free, size_bytes, to_json, write_bytes

_HERE = Path(__file__).parent
PAGE, ALONE = _HERE / "page", _HERE / "alone"
BUNDLE, NPM, SIZES = "bundle", "npm", "sizes.json"
_TOKENIZERS = ("BPE", "WordPiece", "Unigram")  # those of @huggingface/tokenizers
_WASM = "ort-wasm-simd-threaded.wasm"


def write_browser(bundle: Path, output: Path, *, node_modules: Path | None = None, overwrite: bool = False) -> Manifest:
    """Write a folder that any static web server serves; returns the bundle's manifest.

    index.html, …    the page of `clip-rd-edge demo`, but its api.js runs the model itself
    bundle/          the bundle as it is
    npm/             what `npm.PACKAGES` names
    sizes.json       bytes that are read before the first picture, and bytes of the bundle, for the page to tell

    Args:
        bundle: an ONNX bundle.
        node_modules: see `npm.find_packages`.

    Raises:
        UsageError: `output` is in use, or the bundle is for another runtime, or its tokenizer of an unknown kind.
        InputError, ConfigError: it is no bundle.
        ClipRdEdgeError: the packages cannot be had; see `npm.find_packages`.
    """
    refuse_unless_free(output, overwrite=overwrite)
    manifest = read_manifest(bundle)
    _require_fit(bundle, manifest)
    with new_folder(output) as folder:
        for source in (PAGE, ALONE):  # the second brings another api.js
            shutil.copytree(source, folder, dirs_exist_ok=True)
        (folder / NPM).mkdir()
        for name, path in find_packages(node_modules).items():
            shutil.copyfile(path, folder / NPM / name)
        shutil.copytree(bundle, folder / BUNDLE)
        write_bytes(folder / SIZES, to_json(_sizes(folder, manifest)))
    return manifest


def _require_fit(bundle: Path, manifest: Manifest) -> None:
    if manifest.target != "onnxruntime":
        raise UsageError(f"The bundle {bundle} is for {manifest.target}; a browser runs those of --format onnx.")
    if manifest.image.takes_pictures:
        raise UsageError(
            f"The bundle {bundle} preprocesses in its graph; in a browser the page does so.",
            hint="leave --preprocess-in-graph away",
        )
    kind = json.loads((bundle / TOKENIZER).read_bytes())["model"]["type"]
    if kind not in _TOKENIZERS:
        raise UsageError(
            f"The bundle {bundle} has a tokenizer of the kind {kind}; a browser has {', '.join(_TOKENIZERS)}."
        )


def _sizes(folder: Path, manifest: Manifest) -> dict[str, int]:
    files = ("manifest.json", manifest.image.file, manifest.text.file, TOKENIZER, LABELS)
    loaded = [folder / NPM / _WASM, *(folder / BUNDLE / name for name in files if (folder / BUNDLE / name).is_file())]
    return {"loaded": sum(map(size_bytes, loaded)), "bundle": size_bytes(folder / BUNDLE)}
