from __future__ import annotations

import base64
import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from clip_rd_edge.errors import ClipRdEdgeError, InputError
from clip_rd_edge.exporting.layouts import browser


def archive(content: bytes = b"export {}") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in ("package/dist/thing.mjs", "package/README.md"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> browser.Package:
    """The only required package; a fake `npm` command downloads it."""
    content = archive()
    digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
    package = browser.Package("@some/thing@1.2.3", sha512=digest, files={"thing.js": "dist/thing.mjs"})
    monkeypatch.setattr(browser, "PACKAGES", (package,))
    monkeypatch.setenv("CLIP_RD_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    (tmp_path / "bin").mkdir()
    (tmp_path / "registry.tgz").write_bytes(content)
    write_npm(tmp_path, f'[ "$2" = @some/thing@1.2.3 ] && cp {tmp_path}/registry.tgz "$5/some-thing-1.2.3.tgz"')
    return package


def write_npm(tmp_path: Path, script: str) -> None:
    """Write a fake `npm` command."""
    (tmp_path / "bin" / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "bin" / "npm").chmod(0o755)


def test_only_the_required_files_are_downloaded_and_only_once(package: browser.Package, tmp_path: Path) -> None:
    path = browser.find_packages()["thing.js"]
    assert path.read_bytes() == b"export {}"
    assert [file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()] == ["thing.mjs"]
    write_npm(tmp_path, "exit 1")
    assert browser.find_packages() == {"thing.js": path}


def test_an_archive_with_another_checksum_is_refused(package: browser.Package, tmp_path: Path) -> None:
    (tmp_path / "registry.tgz").write_bytes(archive(b"evil()"))
    with pytest.raises(ClipRdEdgeError, match=r"download of @some/thing@1\.2\.3 from npm's registry has SHA-512"):
        browser.find_packages()
    assert not (tmp_path / "cache").exists()


def test_without_a_network_the_hint_explains_the_manual_installation(
    package: browser.Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ("code ENOTFOUND", "errno ENOTFOUND", "no such host", "A complete log of this run can be found in: /log")
    shown = "; ".join(f"echo 'npm error {line}' >&2" for line in lines)
    # As npm does, which with --silent is silent, and needs a folder of its own.
    write_npm(tmp_path, f'[ "$3" != --silent ] && mkdir -p "$npm_config_cache" && {{ {shown}; }}; exit 1')
    monkeypatch.setenv("HOME", "/proc")
    with pytest.raises(
        ClipRdEdgeError, match="which the browser page needs, from npm's registry: no such host"
    ) as raised:
        browser.find_packages()
    assert raised.value.hint.startswith("npm install @some/thing@1.2.3 ")
    assert raised.value.hint.endswith("--node-modules")


def test_installed_packages_are_used(package: browser.Package, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"node_modules has no @some/thing/dist/thing\.mjs"):
        browser.find_packages(tmp_path / "node_modules")
    file = tmp_path / "node_modules" / "@some" / "thing" / "dist" / "thing.mjs"
    file.parent.mkdir(parents=True)
    file.touch()
    assert browser.find_packages(tmp_path / "node_modules") == {"thing.js": file}


def test_the_urls_of_the_archives() -> None:
    assert [package.url for package in browser.PACKAGES] == [
        f"https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-{browser.PACKAGES[0].spec.rpartition('@')[2]}.tgz",
        f"https://registry.npmjs.org/@huggingface/tokenizers/-/tokenizers-{browser.PACKAGES[1].spec.rpartition('@')[2]}.tgz",
    ]
