"""What bundles answer on processors that are not here, by user-mode emulation with QEMU.

    python -m benchmarks.devices.emulate quickstart/bundles/fp32 quickstart/bundles/int8 --cpu Haswell cortex-a76
    python -m benchmarks.devices.emulate quickstart/bundles/* -o benchmarks/results/MACHINE/emulated.json \\
        --readme benchmarks/measurements/processors.md

Needs Debian or Ubuntu with `apt-get install qemu-user-static debootstrap`, and for the images the extra [emoji]. An
arm64 Debian with the wheels of the base install is set up once in the user's cache (a minute, 0.5 GB); x86 processors
run this Python. A bundle runs in its own runtime: ONNX Runtime, or LiteRT with the extra [litert]. Emulation executes
the instructions of the other processor, so that the runtime takes the kernels that it takes there: it shows which
answers come out, and tells nothing of speed.

For each bundle and processor: the greatest difference of an embedding to the same bundle's here, the centred cosine to
the embeddings here of the same model in FP32, which is the bundle for ONNX Runtime in the same parent folder, top-1 on
images of the quickstart's tasks, and what `clip-rd-edge verify` finds there. Where that FP32 bundle is not given, it
runs here alone: emulating floating-point arithmetic is ten times as slow as emulating INT8.

A processor takes minutes to hours: each answer is written to -o as it comes, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from clip_rd_edge.benchmarking.report import write_between_markers
from clip_rd_edge.benchmarking.results import Environment, this_environment
from clip_rd_edge.benchmarking.tables import markdown_table
from clip_rd_edge.bundle.manifest import MANIFEST, read_manifest
from clip_rd_edge.data.emoji import zero_shot_task
from clip_rd_edge.exporting.parity import agreement
from clip_rd_edge.utils.files import sha256_of, write_bytes
from clip_rd_edge.utils.paths import cache_home
from clip_rd_edge.utils.structs import read_json, to_json

# QEMU's names by architecture. Haswell and EPYC (Zen 1) have AVX2 without VNNI, Nehalem has SSE alone; the Cortex-A53
# and A72 (Raspberry Pi 3 and 4) have neither dot products nor FP16 arithmetic, the A76 (Raspberry Pi 5) has both.
PROCESSORS = {
    "Nehalem": "x86_64",
    "Haswell": "x86_64",
    "EPYC": "x86_64",
    "cortex-a53": "aarch64",
    "cortex-a72": "aarch64",
    "cortex-a76": "aarch64",
}
NATIVE, NAME = "native", "emulated"
SUITE = "trixie"  # whose Python is 3.13
ARM_PYTHON = "3.13"
# What a device has installed: the project's base dependencies, and LiteRT's runtime.
PACKAGES = (
    "numpy", "onnxruntime", "pillow", "tokenizers", "ftfy", "click", "rich", "msgspec", "PyYAML", "filelock",
    "ai-edge-litert",
)  # fmt: skip
PLATFORMS = ("manylinux2014_aarch64", "manylinux_2_27_aarch64", "manylinux_2_28_aarch64")
ARM_CACHE = cache_home() / f"arm64-{SUITE}"
ROOT = Path(__file__).resolve().parents[2]

WORKER = """
import sys
from pathlib import Path

import numpy as np

from clip_rd_edge.bundle.encoder import label_embeddings
from clip_rd_edge.bundle.images import open_image
from clip_rd_edge.runtime.load import load
from clip_rd_edge.runtime.verify import verify_bundle

bundle, images, texts, output = sys.argv[1:]
encoder = load(bundle, threads=1, device="cpu")
paths = Path(images).read_text().splitlines()
# One at a time, as a device sees them.
rows = np.concatenate([encoder.encode_images([open_image(Path(path))]) for path in paths])
labels = label_embeddings(encoder, Path(texts).read_text().splitlines(), ("{}",))  # without a text tower, the bank's
checks = verify_bundle(Path(bundle), threads=1, device="cpu", time_limit_s=86_400)
failed = "; ".join(f"{check.what}: {check.detail}" for check in checks if not check.passed)
np.savez(output, images=rows, texts=labels, failed=np.array(failed))
"""


class Answers(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle answered on a processor.

    Attributes:
        bundle_sha256: of the bundle's manifest, which has the checksums of its files.
        max_difference: greatest absolute difference of an embedding entry to the same bundle's on this machine.
        image_cosine, text_cosine: centred cosine with FP32's embeddings on this machine.
        top1: share of the images whose label comes first.
        failed: which checks of `verify` fail there, and why, or empty.
        problem: why it does not run there, or empty.
    """

    bundle: str
    processor: str
    bundle_sha256: str = ""
    max_difference: float = 0.0
    image_cosine: float = 0.0
    text_cosine: float = 0.0
    top1: float = 0.0
    failed: str = ""
    problem: str = ""


class Emulated(msgspec.Struct, frozen=True, kw_only=True):
    """All of a run; numbers of images and labels in all."""

    environment: Environment
    qemu: str
    images: int
    labels: int
    answers: tuple[Answers, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description="Run bundles on emulated processors and compare their answers.")
    parser.add_argument("bundles", type=Path, nargs="+", help="one in FP32, for ONNX Runtime, is beside each")
    parser.add_argument("--cpu", nargs="+", choices=PROCESSORS, default=list(PROCESSORS))
    parser.add_argument("--images", type=int, default=190, help="per task of the embedded data set (default: 190)")
    parser.add_argument("--labels", type=int, default=570, help="to choose from, at least the images' (default: all)")
    parser.add_argument("-o", "--output", type=Path, help="a JSON file")
    parser.add_argument("--readme", type=Path, help="where the table goes, between marks of the output's name")
    arguments = parser.parse_args()
    questions = Questions.drawn(images=arguments.images, labels=arguments.labels)
    results = run(arguments.bundles, arguments.cpu, questions, output=arguments.output)
    print(table(results))
    if arguments.readme:
        write_between_markers(arguments.readme, arguments.output.stem if arguments.output else NAME, table(results))


@dataclass(frozen=True)
class Questions:
    """Files of images, the labels to choose from, and the index of each image's label."""

    images: Sequence[str]
    labels: Sequence[str]
    truth: np.ndarray

    @classmethod
    def drawn(cls, *, images: int, labels: int) -> Questions:
        """Draw images of each of the embedded tasks, and labels, which are at least the images' own."""
        tasks = [zero_shot_task(split) for split in ("unseen style", "unseen concepts")]
        rng = np.random.default_rng(0)
        shown = [
            (task, int(i)) for task in tasks for i in rng.permutation(len(task.images))[: min(images, len(task.images))]
        ]
        own = {task.labels[task.targets[i]] for task, i in shown}
        others = rng.permutation(sorted({label for task in tasks for label in task.labels} - own))
        among = sorted([*own, *map(str, others[: max(0, labels - len(own))])])
        truth = np.array([among.index(task.labels[task.targets[i]]) for task, i in shown])
        return cls([str(task.images[i]) for task, i in shown], among, truth)


def run(bundles: Sequence[Path], processors: Sequence[str], questions: Questions, *, output: Path | None) -> Emulated:
    """Embed images and labels by every bundle on every processor, and on this machine; `output` gets each answer."""
    references = references_of(bundles)
    qemu = subprocess.run(["qemu-aarch64-static", "--version"], capture_output=True, text=True, check=True)
    results = Emulated(
        environment=this_environment(),
        qemu=qemu.stdout.splitlines()[0],
        images=len(questions.images),
        labels=len(questions.labels),
        answers=(),
    )
    places = dict.fromkeys(references.values(), (NATIVE,))
    places |= dict.fromkeys(bundles, (NATIVE, *processors))
    digests = {bundle: sha256_of(bundle / MANIFEST) for bundle in places}
    titles = {title_of(bundle) for bundle in places}
    answers = {  # those of other bundles stay, and those of a changed one go
        key: row
        for key, row in answers_of(output, results).items()
        if key[2] in digests.values() or key[0] not in titles
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "images.txt").write_text("\n".join(questions.images), encoding="utf-8")
        (folder / "texts.txt").write_text("\n".join(questions.labels), encoding="utf-8")
        here = {bundle: embed(bundle, NATIVE, folder) for bundle in places}
        if problems := [rows for rows in here.values() if isinstance(rows, str)]:
            raise SystemExit(f"error: a bundle does not run on this machine: {problems[0]}")
        for bundle, digest in digests.items():
            for processor in places[bundle]:
                print(f"{bundle} on {processor}", file=sys.stderr, flush=True)
                key = (title_of(bundle), processor, digest)
                if key not in answers:
                    rows = here[bundle] if processor == NATIVE else embed(bundle, processor, folder)
                    fp32 = here[references.get(bundle, bundle)]
                    answer = compare(bundle, processor, rows, here[bundle], fp32, questions.truth)
                    answers[key] = msgspec.structs.replace(answer, bundle_sha256=digest)
                results = msgspec.structs.replace(results, answers=tuple(answers.values()))
                if output:
                    write_bytes(output, to_json(results))
    return results


def references_of(bundles: Sequence[Path]) -> dict[Path, Path]:
    """Each bundle's reference: the FP32 bundle for ONNX Runtime in the same parent folder, which has one model's."""
    references = {}
    for bundle in bundles:
        siblings = (path.parent for path in sorted(bundle.resolve().parent.glob(f"*/{MANIFEST}")))
        # As the command names it where it does: the rows of a bundle are kept by its path.
        named = [*bundles, *siblings]
        for other in (path for path in named if path.resolve().parent == bundle.resolve().parent):
            manifest = read_manifest(other)
            if (manifest.precision, manifest.target) == ("fp32", "onnxruntime"):
                references[bundle] = other
                break
    if missing := [str(bundle) for bundle in bundles if bundle not in references]:
        raise SystemExit(f"error: no bundle in FP32, for ONNX Runtime, is in the same folder as {', '.join(missing)}")
    return references


def title_of(bundle: Path) -> str:
    """What a bundle is called in the table: its name, after the student's if its parent folder is named so."""
    student = bundle.resolve().parent.name
    return bundle.name if student == "bundles" else f"{student} {bundle.name}"


def answers_of(output: Path | None, expected: Emulated) -> dict[tuple[str, str, str], Answers]:
    """What an interrupted run of the same machine and images has written, by bundle, processor and checksum."""
    if output is None or not output.is_file():
        return {}
    before = read_json(output, Emulated)
    if (before.images, before.labels, before.qemu) != (expected.images, expected.labels, expected.qemu):
        return {}
    if before.environment.machine != expected.environment.machine:
        return {}
    return {(row.bundle, row.processor, row.bundle_sha256): row for row in before.answers}


def embed(bundle: Path, processor: str, folder: Path) -> Mapping[str, np.ndarray] | str:
    """Embeddings of the `images` and `texts` listed in `folder` and which checks `failed`, or why it does not run."""
    output = folder / f"{title_of(bundle)}-{processor}.npz"
    arguments = [
        "-c",
        WORKER,
        str(bundle.resolve()),
        str(folder / "images.txt"),
        str(folder / "texts.txt"),
        str(output),
    ]
    done = subprocess.run(
        [*interpreter(processor), *arguments],
        env=environment_of(processor),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and "TCG doesn't support" not in line]
        return lines[-1].strip() if lines else f"it ended with {done.returncode}"
    with np.load(output) as arrays:
        return dict(arrays)


def interpreter(processor: str) -> list[str]:
    """The command that runs Python on a processor."""
    if processor == NATIVE:
        return [sys.executable]
    if PROCESSORS[processor] == "x86_64":
        return ["qemu-x86_64-static", "-cpu", processor, sys.executable]
    root = arm_root()
    return ["qemu-aarch64-static", "-cpu", processor, "-L", str(root), str(root / "usr/bin" / f"python{ARM_PYTHON}")]


def environment_of(processor: str) -> dict[str, str]:
    """Environment variables of the interpreter."""
    if processor == NATIVE or PROCESSORS[processor] == "x86_64":
        return {**os.environ, "PYTHONPATH": str(ROOT)}
    root = arm_root()
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "CLIP_RD_EDGE_CACHE", "TMPDIR") if name in os.environ}
    paths = f"{ROOT}{os.pathsep}{root / 'wheels'}"
    return {**kept, "QEMU_LD_PREFIX": str(root), "PYTHONHOME": str(root / "usr"), "PYTHONPATH": paths}


def arm_root() -> Path:
    """An arm64 Debian with Python and PACKAGES, unpacked without root's rights or a chroot; made once."""
    root, wheels = ARM_CACHE, "\n".join(PACKAGES)
    installed = root / "complete"
    if installed.is_file() and installed.read_text(encoding="utf-8") == wheels:
        return root
    if not installed.is_file():
        shutil.rmtree(root, ignore_errors=True)
        print(f"setting up an arm64 Debian in {root}", file=sys.stderr, flush=True)
        command = ["debootstrap", "--arch=arm64", "--foreign", "--variant=minbase", "--include=python3"]
        subprocess.run([*command, SUITE, str(root)], check=True, stdout=sys.stderr)
        for package in sorted((root / "var/cache/apt/archives").glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True)
    shutil.rmtree(root / "wheels", ignore_errors=True)
    platforms = [argument for name in PLATFORMS for argument in ("--platform", name)]
    subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--quiet", "--target", str(root / "wheels"), *platforms,
            "--python-version", ARM_PYTHON, "--only-binary=:all:", *PACKAGES,
        ],
        check=True,
        stdout=sys.stderr,
    )  # fmt: skip
    installed.write_text(wheels, encoding="utf-8")
    return root


def compare(
    bundle: Path,
    processor: str,
    rows: Mapping[str, np.ndarray] | str,
    here: Mapping[str, np.ndarray],
    fp32: Mapping[str, np.ndarray],
    truth: np.ndarray,
) -> Answers:
    """What came out on a processor, beside what comes out here."""
    if isinstance(rows, str):
        return Answers(bundle=title_of(bundle), processor=processor, problem=rows)
    return Answers(
        bundle=title_of(bundle),
        processor=processor,
        max_difference=max(float(np.abs(rows[name] - here[name]).max()) for name in ("images", "texts")),
        image_cosine=agreement(fp32["images"], rows["images"]).centred_cosine,
        text_cosine=agreement(fp32["texts"], rows["texts"]).centred_cosine,
        top1=float(np.mean((rows["images"] @ rows["texts"].T).argmax(axis=1) == truth)),
        failed=str(rows["failed"]),
    )


def table(results: Emulated) -> str:
    """A Markdown table: a row per bundle and processor."""
    lines = [["bundle", "processor", "max. difference to here", "image cosine", "text cosine", "top-1, %", "verify"]]
    for row in results.answers:
        if row.problem:
            lines.append([row.bundle, row.processor, row.problem, "–", "–", "–", "–"])
            continue
        figures = [f"{row.max_difference:.1g}", f"{row.image_cosine:.4f}", f"{row.text_cosine:.4f}"]
        lines.append(
            [row.bundle, row.processor, *figures, f"{100 * row.top1:.1f}", "fails" if row.failed else "passes"]
        )
    return markdown_table(lines, left=(0, 1))


if __name__ == "__main__":
    main()
