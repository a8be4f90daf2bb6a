"""Build the wheel and the source distribution of a release, and check both in clean environments.

python packaging/release.py -o dist --bundle quickstart/bundles/int8

Nothing is published: docs/releasing.md says how that is done. Each environment has the wheel, one extra and nothing
else, in the versions of requirements.lock; with --bundle, the bundle is verified in each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import lock

ROOT = Path(__file__).parents[1]
# What is easily lost from an archive: files that no import needs.
IN_WHEEL = (
    "clip_rd_edge/py.typed",
    "clip_rd_edge/serving/page/index.html",
    "clip_rd_edge/benchmarking/page.html",
    "clip_rd_edge/distillation/recipes/clip-rd.yaml",
    "clip_rd_edge/models/configs/resnet18.json",
    "clip_rd_edge/_shipped/benchmarks/suites/quickstart.yaml",
    "clip_rd_edge/_shipped/export/README.md",
)
IN_SDIST = ("LICENSE", "NOTICE", "README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml", "tests/conftest.py")


class ReleaseError(Exception):
    """The release is not fit to be published."""


def version_of(root: Path) -> str:
    """Return the version in the package, which the citation and the changelog must have, too.

    Raises:
        ReleaseError: they differ.
    """
    version = _match(r'^__version__ = "(.+)"$', root / "clip_rd_edge" / "__init__.py")
    cited = _match(r"^version: (.+)$", root / "CITATION.cff")
    latest = _match(r"^## (\S+)", root / "CHANGELOG.md")
    if cited != version:
        raise ReleaseError(f"CITATION.cff has version {cited}, and the package {version}.")
    if latest not in (version, "Unreleased"):
        raise ReleaseError(f"CHANGELOG.md begins with {latest}, and the package is {version}.")
    return version


def _match(pattern: str, path: Path) -> str:
    found = re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise ReleaseError(f"{path} has no line like {pattern}.")
    return found[1]


def check_final(root: Path, version: str, tag: str) -> None:
    """Check what may be unfinished in a trial, but not in a release.

    Raises:
        ReleaseError: the tag is another version's, the changelog has no entry of this version, or there are changes
            that are not committed.
    """
    if tag != f"v{version}":
        raise ReleaseError(f"The tag is {tag}, and the package has version {version}; expected the tag v{version}.")
    if _match(r"^## (\S+)", root / "CHANGELOG.md") != version:
        raise ReleaseError(f"CHANGELOG.md still begins with Unreleased; head the entry: {version}.")
    changes = _run(["git", "status", "--porcelain"], cwd=root)
    if changes:
        raise ReleaseError(f"There are changes that are not committed:\n{changes}")


def build(root: Path, output: Path) -> list[Path]:
    """Build the source distribution, and the wheel from it; return both, the wheel last."""
    date = _run(["git", "log", "-1", "--format=%ct"], cwd=root).strip()  # the same commit gives the same bytes
    environment = {**os.environ, "SOURCE_DATE_EPOCH": date}
    _run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), str(root)], environment=environment)
    files = [*output.glob("*.tar.gz"), *output.glob("*.whl")]
    if len(files) != 2:
        raise ReleaseError(f"{output} holds {len(files)} archives; expected one .tar.gz and one .whl.")
    return files


def check_contents(sdist: Path, wheel: Path, version: str) -> None:
    """Check names and contents of both archives.

    Raises:
        ReleaseError: a file is missing, or one is there that does not belong there.
    """
    stem = f"clip_rd_edge-{version}"
    if sdist.name != f"{stem}.tar.gz" or wheel.name != f"{stem}-py3-none-any.whl":
        raise ReleaseError(f"{sdist.name} and {wheel.name} are not archives of version {version}.")
    with tarfile.open(sdist) as archive:
        _require(IN_SDIST, (name.removeprefix(f"{stem}/") for name in archive.getnames()), sdist)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    licences = [f"{stem}.dist-info/licenses/{name}" for name in ("LICENSE", "NOTICE")]
    _require([*IN_WHEEL, *licences], names, wheel)
    if foreign := [name for name in names if not name.startswith(("clip_rd_edge/", f"{stem}.dist-info/"))]:
        raise ReleaseError(f"{wheel.name} holds {foreign[0]}, which is not part of the package.")


def _require(expected: Iterable[str], names: Iterable[str], archive: Path) -> None:
    if missing := sorted(set(expected) - set(names)):
        raise ReleaseError(f"{archive.name} lacks {', '.join(missing)}.")


def check_installed(archive: Path, extra: str, version: str, bundle: Path | None) -> None:
    """Install an archive with an extra into a new environment, and use it there.

    Raises:
        ReleaseError: it cannot be installed, or a command fails.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "env", with_pip=True)
        scripts = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
        requirement = f"{archive.resolve()}[{extra}]" if extra else str(archive.resolve())
        versions = folder / "versions.txt"
        versions.write_text(lock.constraints(lock.read_lock()), encoding="utf-8")
        _run([str(scripts / "python"), "-m", "pip", "install", "--quiet", "--constraint", str(versions), requirement])
        program = str(scripts / "clip-rd-edge")
        # Elsewhere than in the clone, whose package would be imported instead.
        shown = _run([program, "--version"], cwd=folder)
        if version not in shown:
            raise ReleaseError(f"{archive.name} installs {shown.strip()}; expected {version}.")
        findings = json.loads(_run([program, "doctor", "--json"], cwd=folder))
        states = {finding["what"]: finding["state"] for finding in findings}
        for part in extra.split(",") if extra else ():
            if states.get(f"[{part}]") != "ok":
                raise ReleaseError(f"doctor does not find the extra {part} in its own environment: {states}.")
        for command in ("targets", "benchmark --init", "classify --help"):
            _run([program, *command.split()], cwd=folder)
        if bundle is not None:
            _run([program, "verify", str(bundle.resolve())], cwd=folder)


def _run(command: Sequence[str], *, cwd: Path | None = None, environment: dict[str, str] | None = None) -> str:
    process = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if process.returncode:
        raise ReleaseError(f"{' '.join(command)} failed:\n{process.stdout}{process.stderr}")
    return process.stdout


def write_checksums(files: Sequence[Path]) -> Path:
    """Write SHA256SUMS beside the files, in the format of sha256sum."""
    path = files[0].with_name("SHA256SUMS")
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in sorted(files)]
    path.write_text("".join(lines))
    return path


def main() -> None:
    """Build and check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "dist", help="an empty folder")
    parser.add_argument("--extras", nargs="*", default=lock.CHECKED, help="extras to check, besides none")
    parser.add_argument("--bundle", type=Path, help="a bundle to verify in every environment")
    parser.add_argument("--final", metavar="TAG", help="refuse what may not be published under this tag")
    args = parser.parse_args()
    if args.output.is_dir() and any(args.output.iterdir()):
        sys.exit(f"error: {args.output} is not empty; archives of another version would be published with this one")
    try:
        version = version_of(ROOT)
        if args.final is not None:
            check_final(ROOT, version, args.final)
        sdist, wheel = build(ROOT, args.output)
        check_contents(sdist, wheel, version)
        _run([sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel)])
        print(f"built {sdist.name} and {wheel.name}", flush=True)
        for archive, extra in [(sdist, ""), (wheel, ""), *((wheel, extra) for extra in args.extras)]:
            check_installed(archive, extra, version, args.bundle)
            print(f"works: {archive.name}{f' with [{extra}]' if extra else ''}", flush=True)
    except ReleaseError as error:
        sys.exit(f"error: {error}")
    print(write_checksums([sdist, wheel]))


if __name__ == "__main__":
    main()
