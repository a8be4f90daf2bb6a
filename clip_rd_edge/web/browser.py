"""The npm packages that run a bundle in a browser: pinned, checked, fetched once, never part of this package."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_rd_edge.contract.bundle import TOKENIZER, Manifest, read_manifest, write_manifest
from clip_rd_edge.contract.label_bank import LABELS
from clip_rd_edge.errors import ClipRdEdgeError, InputError, UsageError
from clip_rd_edge.runtime.labels import write_label_bank
from clip_rd_edge.utils.io import cache_home, new_folder, refuse_unless_free, size_bytes, to_json, write_bytes

_PATIENCE_S = 60


@dataclass(frozen=True, kw_only=True)
class Package:
    """A version of an npm package.

    Attributes:
        sha512: of its archive, base64, as npm's `dist.integrity` has it.
        files: those that are needed, by the name that the page knows them by: scripts end in .js, since some servers do
            not know .mjs.
    """

    name: str
    version: str
    sha512: str
    files: Mapping[str, str]

    @property
    def spec(self) -> str:
        """As npm takes it."""
        return f"{self.name}@{self.version}"

    @property
    def url(self) -> str:
        """Of its archive."""
        archive = f"{self.name.rsplit('/', 1)[-1]}-{self.version}.tgz"
        return f"https://registry.npmjs.org/{self.name}/-/{archive}"


PACKAGES = (
    Package(
        name="onnxruntime-web",
        version="1.30.0",
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
        name="@huggingface/tokenizers",
        version="0.2.0",
        sha512="LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
        files={"tokenizers.js": "dist/tokenizers.min.mjs", "tokenizers.LICENSE.txt": "LICENSE"},
    ),
)


def find_packages(node_modules: Path | None = None) -> dict[str, Path]:
    """The files of `PACKAGES`, by the name that the page knows them by.

    Args:
        node_modules: where npm has installed the packages; None takes them from the cache, and fetches those
            that it lacks.

    Raises:
        InputError: a file is not in `node_modules`.
        ClipRdEdgeError: a package can neither be found in the cache nor fetched.
    """
    found: dict[str, Path] = {}
    for package in PACKAGES:
        source = _installed(package, node_modules) if node_modules else _cached(package)
        found |= {name: source / file for name, file in package.files.items()}
    return found


def _installed(package: Package, node_modules: Path) -> Path:
    source = node_modules / package.name
    for file in package.files.values():
        if not (source / file).is_file():
            raise InputError(
                f"{node_modules} has no {package.name}/{file}.", hint=_by_hand(f"in {node_modules.parent}")
            )
    return source


def _cached(package: Package) -> Path:
    source = cache_home() / "npm" / package.spec.replace("/", "-")
    if not all((source / file).is_file() for file in package.files.values()):
        archive = _checked(package, _fetched(package))
        with new_folder(source) as folder, tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            for file in package.files.values():
                member = tar.extractfile(f"package/{file}")
                assert member is not None  # the archive is the one whose files were listed above
                write_bytes(folder / file, member.read())
    return source


def _fetched(package: Package) -> bytes:
    """The package's archive, by npm, which knows the user's mirror and proxy; without npm, from the registry itself."""
    npm = shutil.which("npm")
    try:
        if npm is None:
            with urllib.request.urlopen(package.url, timeout=_PATIENCE_S) as response:
                content: bytes = response.read()
            return content
        with tempfile.TemporaryDirectory() as scratch:
            command = [npm, "pack", package.spec, "--silent", "--pack-destination", scratch]
            subprocess.run(command, check=True, capture_output=True, text=True, cwd=scratch)
            return next(Path(scratch).glob("*.tgz")).read_bytes()
    except (OSError, StopIteration, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        reason = said[-1].removeprefix("npm error ") if said else "npm gave no reason"
        raise ClipRdEdgeError(
            f"{package.spec}, which runs the bundle in the browser, cannot be fetched from npm's registry: {reason}.",
            hint=_by_hand("on a machine with a network"),
        ) from error


def _checked(package: Package, archive: bytes) -> bytes:
    found = base64.b64encode(hashlib.sha512(archive).digest()).decode()
    if found != package.sha512:
        raise ClipRdEdgeError(
            f"What npm's registry gave as {package.spec} is not that: its SHA-512 is {found}, not {package.sha512}.",
            hint="look at the registry or mirror that npm is set to",
        )
    return archive


def _by_hand(where: str) -> str:
    specs = " ".join(package.spec for package in PACKAGES)
    return f"npm install {specs} {where}, and give its node_modules with --node-modules"


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
    if manifest.image.preprocesses:
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


def write_from_bundle(
    bundle: Path, output: Path, options: Mapping[str, Any], pretrained: str | None, *, overwrite: bool
) -> Manifest:
    """Write the folder for the browser from a bundle that is there already, with a label bank where labels are given.

    Args:
        options: those of the export; `labels` are read already.

    Raises:
        UsageError: an option asks for what a finished bundle cannot become, or the bundle is for another runtime.
    """
    fixed = {"pretrained": pretrained, "precision": options.get("precision"), "calibration": options.get("calibration")}
    for name, value in fixed.items():
        if value is not None:
            raise UsageError(
                f"{bundle} is a bundle already, which --{name} cannot change.", hint=f"leave --{name} away"
            )
    node_modules, labels = options.get("node_modules"), options.get("labels")
    with tempfile.TemporaryDirectory() as scratch:
        if labels is not None:
            bundle = shutil.copytree(bundle, Path(scratch) / "bundle")
            manifest = read_manifest(bundle)
            write_label_bank(bundle, manifest, labels)
            write_manifest(bundle, manifest)
        return write_browser(
            bundle, output, node_modules=Path(node_modules) if node_modules else None, overwrite=overwrite
        )
