"""Run every command on every hostile file that it reads, with little memory: each ends with an answer or a sentence.

    python -m benchmarks.robustness.hostile_input -o benchmarks/results/MACHINE/hostile-input.json  # some minutes
    python -m benchmarks.robustness.hostile_input --without-torch images labels  # two kinds of files

The files are those of tests/corpus, and files of three gigabytes that are mostly holes. A command gets 2 GB of address
space, or 4 GB where it imports torch (as `ulimit -v`), and ten seconds of a processor. It must end with exit code 0, or
with a message of this package (exit code 1 or 2), and never with an error of Python, a signal or silence. Each command
runs in a fork of a process that has imported what takes seconds to import. Exit code 1 if one does not end so.
"""

from __future__ import annotations

import argparse
import importlib
import json
import lzma
import os
import resource
import shlex
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.publishing import here_and_now
from clip_rd_edge.utils.files import write_text

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "tests" / "corpus"
GOOD = CORPUS / "good"  # a bundle and an image to use with the hostile files
HUGE_BYTES = 3 << 30
MAX_SECONDS = 10  # of a processor
MEMORY = {False: 2 << 30, True: 4 << 30}  # by whether torch is imported
_DISTILL = "distill --student resnet10t --image-size 32 --text 64x1 --context-length 8 --embedding-size 8 --steps 2 "
# The commands that read a kind of file, and those of them that import torch. B is a good bundle, P a good image, F the
# file, D a folder with it, H a bundle with it, I an index with it, T a model's folder with it, and O an output.
COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "images": (["classify B F --labels red green", "index B D -o O"], []),
    "shards": (["evaluate B --task F"], [f"{_DISTILL} --recipe clip --data F -o O"]),
    "tables": (["evaluate B --task F"], [f"{_DISTILL} --recipe clip --data F -o O"]),
    "labels": (["classify B P --labels F"], []),
    "configs": (["recipe F", "benchmark F -o O"], [f"{_DISTILL} --recipe F --data F -o O", "evidence run F -o O"]),
    "manifests": (["classify H P --labels red green", "verify H", "index H D -o O"], ["export H -o O"]),
    "banks": (["classify H P", "verify H"], []),
    "tokenizers": (["classify H P --labels red green", "verify H"], []),
    "towers": (["classify H P --labels red green", "verify H"], []),
    "indexes": (["search I red", "index B D -o I"], []),
    "teachers": ([], ["export T -o O", f"{_DISTILL} --recipe clip-rd --data TABLE --teacher T -o O"]),
}
_PLACES = {"manifests": "manifest.json", "banks": "labels.npz", "tokenizers": "tokenizer.json", "towers": "image.onnx"}
_MAX_SEALED = 1 << 24  # bytes of an index that is read to compute its checksum
# The beginnings of the large files.
HEADS = {
    "images": ("a.bmp", b"BM"),
    "shards": ("a.tar", b"a.png"),
    "tables": ("a.csv", b"filepath,title\na.png,red\n"),
    "labels": ("a.txt", b"red\n"),
    "configs": ("a.yaml", b"steps: 3\n"),
    "manifests": ("a.json", b'{"format_version": 1}'),
    "indexes": ("a.json", b"{"),
    "teachers": ("a.json", b"{"),
}


def unpacked(path: Path, folder: Path) -> Path:
    """Return a copy of a file of the corpus; the larger ones are kept compressed."""
    packed = path.suffix == ".xz"
    copy = folder / (path.stem if packed else path.name)
    copy.write_bytes(lzma.decompress(path.read_bytes()) if packed else path.read_bytes())
    return copy


def huge_file(kind: str, folder: Path) -> Path:
    """Write a file of HUGE_BYTES that takes no room on the disk."""
    name, head = HEADS[kind]
    path = folder / name
    path.write_bytes(head)
    os.truncate(path, HUGE_BYTES)
    return path


@dataclass(frozen=True)
class Outcome:
    """What a command did with a file.

    Attributes:
        seconds: of a processor.
        memory_mb: the most that was resident.
        message: the last line of stderr.
        problem: why that is none of the ways to end, or empty.
    """

    kind: str
    file: str
    command: str
    code: int
    seconds: float
    memory_mb: float
    message: str
    problem: str


def run(kind: str, file: str, command: str, place: Path, *, torch: bool) -> Outcome:
    """Run a command in a fork, in the folder `place`."""
    with tempfile.TemporaryFile() as output:
        process = os.fork()
        if process == 0:
            _run_in_fork(shlex.split(command), place, output.fileno(), MEMORY[torch])
        code, usage = _wait(process)
        output.seek(0)
        text = output.read().decode(errors="replace").replace(str(place), "…")
    seconds = usage.ru_utime + usage.ru_stime
    lines = [line for line in text.replace(str(ROOT), ".").splitlines() if line.strip()] or [""]
    return Outcome(
        kind, file, command.split()[0], code, round(seconds, 2), round(usage.ru_maxrss / 1e3), lines[-1][:200],
        _problem(code, text, seconds),
    )  # fmt: skip


def _problem(code: int, text: str, seconds: float) -> str:
    if code < 0:
        return f"ended by signal {-code}"
    if seconds > MAX_SECONDS:
        return f"{seconds:.0f} s"
    if "with --debug to see the traceback" in text or "Traceback (most recent call last)" in text:
        return "an error of Python: " + next(iter(line for line in text.splitlines() if "rror" in line), "")[:200]
    if code not in (0, 1, 2):
        return f"exit code {code}"
    return "" if code == 0 or "error: " in text or "refused" in text else "no sentence"


def _run_in_fork(arguments: Sequence[str], place: Path, output: int, memory: int) -> NoReturn:
    code = 70
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(output, 2)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        os.chdir(place)
        os.environ["CLIP_RD_EDGE_CACHE"] = str(place / "cache")
        os.environ["CLIP_RD_EDGE_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (4 * MAX_SECONDS, 4 * MAX_SECONDS))
        from clip_rd_edge.cli.main import main

        sys.argv = ["clip-rd-edge", *arguments]
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:  # noqa: BLE001  the fork must end here, whatever happens
        with suppress(BaseException):
            print(f"Traceback (most recent call last): {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _wait(process: int) -> tuple[int, resource.struct_rusage]:
    """Return exit code, or minus the signal, and usage of a fork; one that waits for a minute is ended."""
    end = time.monotonic() + 60 + 20 * os.getloadavg()[0]
    while True:
        ended, status, usage = os.wait4(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), usage
        if time.monotonic() > end:
            os.kill(process, 9)
            _, status, usage = os.wait4(process, 0)
            return os.waitstatus_to_exitcode(status), usage
        time.sleep(0.02)


def prepare(kind: str, path: Path, place: Path) -> dict[str, str]:
    """Put a file where commands look for it; return what the letters of COMMANDS stand for."""
    from clip_rd_edge.bundle.manifest import read_manifest, write_manifest

    (place / "folder").mkdir()
    inside = place / "folder" / path.name
    inside.hardlink_to(path)
    shutil.copy(GOOD / "red.png", place / "folder" / "good.png")
    (place / "table.csv").write_text(f"filepath,title\n{GOOD / 'red.png'},red\n{place / 'folder' / 'good.png'},blue\n")
    names = {"B": str(GOOD / "bundle"), "P": str(GOOD / "red.png"), "F": str(inside), "D": str(place / "folder"),
             "O": str(place / "output"), "TABLE": str(place / "table.csv")}  # fmt: skip
    for letter, name, contents in (("H", "bundle", GOOD / "bundle"), ("I", "index", None), ("T", "teacher", None)):
        folder = place / name
        shutil.copytree(contents, folder) if contents else folder.mkdir()
        names[letter] = str(folder)
    target = place / "teacher" / "open_clip_config.json" if kind == "teachers" else None
    if kind in _PLACES:
        target = place / "bundle" / _PLACES[kind]
        target.unlink(missing_ok=True)
    if target:
        target.hardlink_to(path)
    if kind in _PLACES and kind != "manifests":
        write_manifest(place / "bundle", read_manifest(place / "bundle"))
    if kind == "indexes":
        place_index(path, place / "index")
    if kind == "teachers":
        names["T"] = f"local-dir:{names['T']}"
    return names


def place_index(path: Path, folder: Path) -> None:
    """Make a folder an index of two images with this content, and the checksum of that, which anybody can compute."""
    import numpy as np

    target = folder / "index.json"
    if path.stat().st_size > _MAX_SEALED or b'"crc32":' in (content := path.read_bytes()):
        target.hardlink_to(path)
    else:
        target.write_bytes(b'{"version":1,"crc32":%d,"index":%b}' % (zlib.crc32(content), content))
    np.save(folder / "embeddings-0.npy", np.eye(2, 3, dtype=np.float32))


def cases(kinds: Sequence[str], scratch: Path, *, large: bool) -> Iterator[tuple[str, str, Path]]:
    """Yield kind, name and a copy of each file."""
    for kind in kinds:
        for path in sorted((CORPUS / kind).iterdir()):
            folder = scratch / "file"
            folder.mkdir()
            yield kind, path.name, unpacked(path, folder)
            shutil.rmtree(folder)
        if large and kind in HEADS:
            folder = scratch / "file"
            folder.mkdir()
            yield kind, "3 GB", huge_file(kind, folder)
            shutil.rmtree(folder)


def run_all(kinds: Sequence[str], *, torch: bool, large: bool = True) -> list[Outcome]:
    """Run the commands of these kinds of files, with or without torch."""
    modules = ["numpy", "onnxruntime", "PIL.Image", "tokenizers", "yaml", "rich.progress", "clip_rd_edge.api"]
    for name in [*modules, *(["torch", "torchvision", "open_clip", "timm"] if torch else [])]:
        with suppress(ImportError):
            importlib.import_module(name)
    outcomes = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for kind, file, path in cases([kind for kind in kinds if COMMANDS[kind][torch]], scratch, large=large):
            for command in COMMANDS[kind][torch]:
                place = scratch / "place"
                place.mkdir()
                names = prepare(kind, path, place)
                words = " ".join(shlex.quote(names.get(word, word)) for word in command.split())
                outcome = run(kind, file, words, place, torch=torch)
                outcomes.append(outcome)
                if outcome.problem:
                    print(f"{kind}/{file}: {outcome.command}: {outcome.problem}", file=sys.stderr, flush=True)
                shutil.rmtree(place)
    return outcomes


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the figures to publish."""
    return {
        **here_and_now(),
        "runs": len(outcomes),
        "files": len({(outcome.kind, outcome.file) for outcome in outcomes}),
        "answers": sum(outcome.code == 0 for outcome in outcomes),
        "sentences": sum(outcome.code != 0 and not outcome.problem for outcome in outcomes),
        "problems": [asdict(outcome) for outcome in outcomes if outcome.problem],
        "most_seconds": max(outcome.seconds for outcome in outcomes),
        "most_memory_mb": max(outcome.memory_mb for outcome in outcomes),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=list(COMMANDS), help="of files; all by default")
    parser.add_argument("--without-torch", action="store_true", help="leave out the commands that import torch")
    parser.add_argument("-o", "--output", type=Path, help="write the figures, and what each command said, to this file")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    outcomes = {False: run_all(options.kinds, torch=False)}  # first, for torch cannot be forgotten
    if not options.without_torch:
        outcomes[True] = run_all(options.kinds, torch=True)
    figures = {("with torch" if torch else "without torch"): summary(part) for torch, part in outcomes.items() if part}
    print(json.dumps(figures, indent=2))
    if options.output:
        runs = [asdict(outcome) for part in outcomes.values() for outcome in part]
        write_text(options.output, json.dumps({**figures, "outcomes": runs}, indent=1) + "\n")
    return int(any(outcome.problem for part in outcomes.values() for outcome in part))


if __name__ == "__main__":
    sys.exit(main())
