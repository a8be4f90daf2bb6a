from __future__ import annotations

import base64
import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from clip_rd_edge.errors import ClipRdEdgeError, InputError
from clip_rd_edge.web import browser as npm


def archive(content: bytes = b"export {}") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in ("package/dist/thing.mjs", "package/README.md"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> npm.Package:
    """The only package that is needed, in a registry of its own: the command `npm` of this test."""
    content = archive()
    digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
    package = npm.Package(name="@some/thing", version="1.2.3", sha512=digest, files={"thing.js": "dist/thing.mjs"})
    monkeypatch.setattr(npm, "PACKAGES", (package,))
    monkeypatch.setenv("CLIP_RD_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    (tmp_path / "bin").mkdir()
    (tmp_path / "registry.tgz").write_bytes(content)
    says(tmp_path, f'[ "$2" = @some/thing@1.2.3 ] && cp {tmp_path}/registry.tgz "$5/some-thing-1.2.3.tgz"')
    return package


def says(tmp_path: Path, script: str) -> None:
    (tmp_path / "bin" / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "bin" / "npm").chmod(0o755)


def test_fetched_once_and_only_what_is_needed(package: npm.Package, tmp_path: Path) -> None:
    path = npm.find_packages()["thing.js"]
    assert path.read_bytes() == b"export {}"
    assert [file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()] == ["thing.mjs"]
    says(tmp_path, "exit 1")
    assert npm.find_packages() == {"thing.js": path}


def test_another_archive_than_the_pinned_one_is_refused(package: npm.Package, tmp_path: Path) -> None:
    (tmp_path / "registry.tgz").write_bytes(archive(b"evil()"))
    with pytest.raises(ClipRdEdgeError, match=r"gave as @some/thing@1\.2\.3 is not that"):
        npm.find_packages()
    assert not (tmp_path / "cache").exists()


def test_without_a_network_the_way_by_hand_is_told(package: npm.Package, tmp_path: Path) -> None:
    says(tmp_path, "echo 'npm error code ENOTFOUND' >&2; echo 'npm error no such host' >&2; exit 1")
    with pytest.raises(ClipRdEdgeError, match="cannot be fetched from npm's registry: no such host") as raised:
        npm.find_packages()
    assert raised.value.hint.startswith("npm install @some/thing@1.2.3 ")
    assert raised.value.hint.endswith("--node-modules")


def test_what_npm_has_installed(package: npm.Package, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"node_modules has no @some/thing/dist/thing\.mjs"):
        npm.find_packages(tmp_path / "node_modules")
    file = tmp_path / "node_modules" / "@some" / "thing" / "dist" / "thing.mjs"
    file.parent.mkdir(parents=True)
    file.touch()
    assert npm.find_packages(tmp_path / "node_modules") == {"thing.js": file}


def test_the_registry_s_addresses() -> None:
    assert [package.url for package in npm.PACKAGES] == [
        f"https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-{npm.PACKAGES[0].version}.tgz",
        f"https://registry.npmjs.org/@huggingface/tokenizers/-/tokenizers-{npm.PACKAGES[1].version}.tgz",
    ]
