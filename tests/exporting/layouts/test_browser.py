from __future__ import annotations

import base64
import hashlib
import io
import tarfile
from pathlib import Path

import pytest

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
    """The only required package, in a registry of its own."""
    content = archive()
    digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
    package = browser.Package("@some/thing@1.2.3", sha512=digest, files={"thing.js": "dist/thing.mjs"})
    monkeypatch.setattr(browser, "PACKAGES", (package,))
    monkeypatch.setenv("CLIP_RD_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", (tmp_path / "registry").as_uri())
    file = tmp_path / "registry" / package.archive
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    return package


def test_only_the_required_files_are_downloaded_and_only_once(package: browser.Package, tmp_path: Path) -> None:
    path = browser.find_packages()["thing.js"]
    assert path.read_bytes() == b"export {}"
    assert [file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()] == ["thing.mjs"]
    (tmp_path / "registry").rename(tmp_path / "gone")
    assert browser.find_packages() == {"thing.js": path}
