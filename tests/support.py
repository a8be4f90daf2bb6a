"""What several tests use."""

from __future__ import annotations

import csv
import io
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
import numpy as np
import pytest
from PIL import Image

from clip_rd_edge.cli.main import cli
from clip_rd_edge.data.samples import Samples
from clip_rd_edge.utils.text import Reporter

if TYPE_CHECKING:
    import onnx

    from clip_rd_edge.bundle.manifest import Manifest
    from clip_rd_edge.exporting.calibration import CalibrationSet
    from clip_rd_edge.exporting.int8.candidates import Float32Tower
    from clip_rd_edge.models.clip import ClipModel

CommandLine = Callable[..., tuple[int, str, str]]  # the fixture `command_line`
# A tower whose INT8 some processors compute wrongly.
VNNI_ALONE = {"instruction_sets": ("x86-64-vnni", "aarch64")}
# Seconds that a test waits for what an idle machine does in one: others may need the processor more.
PATIENCE_S = 120.0
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 60, 220), "yellow": (230, 220, 40)}


def wait_until(condition: Callable[[], object], *, seconds: float = PATIENCE_S, pause: float = 0.01) -> bool:
    """Wait until a condition holds; return whether it does."""
    end = time.monotonic() + seconds
    while not (holds := bool(condition())) and time.monotonic() < end:
        time.sleep(pause)
    return holds


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


_PATIENT = """
import sys
from clip_rd_edge.cli.main import main
from clip_rd_edge.serving import server
server.MAX_CONNECTIONS, server.REQUEST_TIMEOUT_S, server.BODY_TIMEOUT_S = int(sys.argv.pop(1)), 10_000, 10_000
main()
"""


def patient_server(*arguments: object, connections: int) -> list[str]:
    """Return the command of a server that gives up no client because of time: what has to help is its other limits."""
    return [sys.executable, "-c", _PATIENT, str(connections), *map(str, arguments)]


@contextmanager
def served(command: Sequence[object], **options: Any) -> Iterator[Any]:
    """Start a server; yield its process with its `url` and `port`, and when the block is over, with its `log`."""
    process: Any = subprocess.Popen([*map(str, command)], stdout=-1, stderr=-1, text=True, **options)
    try:
        process.url = process.stdout.readline().strip()
        process.port = int(process.url.rstrip("/").rpartition(":")[2])
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        process.log = process.communicate(timeout=60)[1]


def fail_to_look_at(patch: pytest.MonkeyPatch, chosen: Callable[[Path], bool], error: OSError) -> None:
    """Let the system raise an error when one of the chosen files is looked at."""
    for name in ("stat", "lstat"):
        plain = getattr(Path, name)

        def look(path: Path, plain: Callable[..., os.stat_result] = plain, **options: Any) -> os.stat_result:
            if chosen(path):
                raise error
            return plain(path, **options)

        patch.setattr(Path, name, look)


def share_in_threads(block: Callable[[], AbstractContextManager[object]], inside: Callable[[], object]) -> object:
    """Let two threads be in a block at once, the first of which leaves first; return what the second then finds."""
    first_in, second_in, first_out = (threading.Event() for _ in range(3))

    def first() -> None:
        with block():
            first_in.set()
            assert second_in.wait(PATIENCE_S)
        first_out.set()

    def second() -> object:
        assert first_in.wait(PATIENCE_S)
        with block():
            second_in.set()
            assert first_out.wait(PATIENCE_S)
            return inside()

    with ThreadPoolExecutor(2) as threads:
        leaving, staying = threads.submit(first), threads.submit(second)
        leaving.result()
        return staying.result()


def assert_form(sentence: str, hint: str = "") -> None:
    """Assert that an error is one sentence for a person (what, where, what was expected), and ways out of it."""
    assert re.match(r"[^a-z\W]|[\W\d]|\S*[./_-]|[a-z]+ (?:is|has|needs|does|takes|cannot)", sentence), sentence
    assert sentence.endswith((".", "?")), sentence
    for text in (sentence, hint):
        assert "\n" not in text
        assert len(text) <= 700, text
        assert not re.search(r"\{[a-z]+(?:_[a-z]+)*\}|Traceback|Error\b|\bNone\b", text), text
    assert not hint.endswith(".") or hint.endswith("…"), hint


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield each command with its name, in one or two words."""
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


class Watch(Reporter):
    """Calls a function at each step of a stage, and keeps what it is told."""

    def __init__(self, stage: str = "training", on_step: Callable[[int], None] = lambda step: None) -> None:
        self.stage, self.on_step = stage, on_step
        self.updates, self.noted = list[tuple[str, int, int | None]](), list[str]()

    def update(self, stage: str, step: int = 0, total: int | None = None, message: str = "") -> None:
        self.updates.append((stage, step, total))
        if stage == self.stage:
            self.on_step(step)

    def note(self, message: str) -> None:
        self.noted.append(message)


def contents(samples: Samples) -> list[tuple[bytes, tuple[str, ...]]]:
    """Return the pixels and the captions of all samples."""
    return [(sample.image().tobytes(), sample.captions) for sample in map(samples.read, range(len(samples)))]


def process_tree(pid: int) -> list[int]:
    """A process and all its descendants; torchrun puts its workers into separate process groups."""
    children = [
        int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()
    ]
    return [pid, *(descendant for child in children for descendant in process_tree(child))]


def is_running(process: int) -> bool:
    """One that has ended does not run, although it is listed until its parent has looked for it."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def one_worker(address: str, make: Callable[[], Callable[[Any], Any]], items: Iterable[Any]) -> Iterator[Any]:
    """A cluster with one worker, in this process, for `utils.cluster.map_on_cluster`."""
    call = pickle.loads(pickle.dumps(make))()
    for item in items:
        yield pickle.loads(pickle.dumps(call(pickle.loads(pickle.dumps(item)))))


def write_pairs(folder: Path) -> Path:
    """Write 24 noisy images in four colours, and a table of them with captions; return the table."""
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(24):
        name = list(COLOURS)[i % 4]
        noise = rng.integers(-20, 20, (40, 48, 3))
        pixels = (np.asarray(COLOURS[name]) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{i}.png")
        rows.append((f"pictures/{i}.png", f"a {name} picture number {i}"))
    with (folder / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("filepath", "title"), *rows])
    return folder / "pairs.csv"


def tiny_clip(
    trunk: str = "test_resnet", *, seed: int = 0, name: str = "tiny", text: str = "64x1", **sizes: int
) -> ClipModel:
    """Return a model with the random weights of a seed, for 32 pixels and 8 tokens unless `sizes` say otherwise."""
    import torch

    from clip_rd_edge.models.students import build_student, student_config

    torch.manual_seed(seed)
    sizes = {"embedding_size": 8, "image_size": 32, "context_length": 8, **sizes}
    return build_student(student_config(trunk, text=text, **sizes), name=name)


def save_tiny_teacher(folder: Path, *, seed: int = 1) -> Path:
    """Write an open_clip model with the random weights of a seed, for 48 pixels and 12 tokens; return its folder."""
    from clip_rd_edge.models.load import save_clip

    clip = tiny_clip(seed=seed, name="teacher", embedding_size=24, image_size=48, context_length=12)
    save_clip(folder, clip, provenance={})
    return folder


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """Write a tar with these members, creating its folder; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_shards(pairs_csv: Path, replaced: Mapping[str, bytes] | None = None) -> str:
    """Write the 24 pairs of `write_pairs` as three shards beside the table; return their name.

    Args:
        replaced: other contents of some files, such as `0005.png`.
    """
    lines, replaced = pairs_csv.read_text().splitlines()[1:], replaced or {}
    for shard in range(3):
        members = dict[str, bytes]()
        for number in range(8 * shard, 8 * shard + 8):
            name, caption = lines[number].split(",")
            members[f"{number:04d}.png"] = (pairs_csv.parent / name).read_bytes()
            members[f"{number:04d}.txt"] = caption.encode()
        members |= {name: replaced[name] for name in members.keys() & replaced.keys()}
        write_tar(pairs_csv.parent / f"{shard}.tar", members)
    return f"{pairs_csv.parent}/{{0..2}}.tar"


def pad_with_another_id(bundle: Path) -> int:
    """Change the fixture `colour_bundle` in place: id 0 becomes that of an unknown word, and padding the id returned.

    Padding adds nothing to a text's embedding, and an unknown word adds 0.001 to every colour.
    """
    import onnx
    from onnx import numpy_helper
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordPiece({"?": 0, "[PAD]": 1, "red": 2, "green": 3, "blue": 4}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(bundle / "tokenizer.json"))
    text = onnx.load(bundle / "text.onnx")
    table = next(tensor for tensor in text.graph.initializer if tensor.name == "table")
    rows = numpy_helper.to_array(table)
    table.CopyFrom(numpy_helper.from_array(np.concatenate([rows[1::-1], rows[2:]]), "table"))
    onnx.save(text, bundle / "text.onnx")
    rewrite(bundle, tokenizer={"pad_id": 1})
    return 1


def require_the_models_answers(bundle: Path, fp32_bundle: Path, *, runtime: str, suffix: str) -> None:
    """Assert that a bundle of one input at a time in float32 says what the ONNX bundle of the same model says."""
    import numpy as np
    from PIL import Image

    from clip_rd_edge.bundle.manifest import read_manifest
    from clip_rd_edge.runtime.load import load
    from clip_rd_edge.runtime.verify import verify_bundle

    manifest = read_manifest(bundle)
    assert (manifest.target, manifest.precision, manifest.image.file) == (runtime, "fp32", f"image{suffix}")
    for tower in manifest.towers.values():
        assert tower.measured is not None
        assert 0 < tower.measured.max_difference < 1e-5  # another runtime rounds differently
        assert tower.one_at_a_time
    encoder, reference = load(bundle, threads=1), load(fp32_bundle)
    assert encoder.describe().runtime == runtime
    noise = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels) for pixels in noise]
    np.testing.assert_allclose(encoder.encode_images(images), reference.encode_images(images), atol=1e-5)
    first = encoder.encode_texts(["red", "a cat"])
    encoder.encode_texts(["blue", "a dog"])  # must not overwrite the first result
    np.testing.assert_allclose(first, reference.encode_texts(["red", "a cat"]), atol=1e-5)
    checks = verify_bundle(bundle)
    assert all(check.passed for check in checks), checks
    assert {check.runtime for check in checks if check.runtime} == {runtime}


# Of an export in INT8: the image tower's weights are rounded to the nearest level, which takes seconds less.
NOT_ADAPTED = {"quantize": "int8"}


def float32_tower(
    bundle: Path, name: str, calibration: CalibrationSet, *, count: int = 32, **rest: Any
) -> Float32Tower:
    """Return a tower of a float32 bundle to quantise, with up to `count` samples of each kind."""
    from clip_rd_edge.exporting.int8.candidates import Float32Tower

    kind = "pixels" if name == "image" else "ids"
    calibrate, held_out = (getattr(part, kind)[:count] for part in (calibration.calibrate, calibration.held_out))
    return Float32Tower(
        **{"name": name, "model": bundle / f"{name}.onnx", "calibrate": calibrate, "held_out": held_out, **rest}
    )


def onnx_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[Any]],
    outputs: Mapping[str, Sequence[Any] | None],
    constants: Mapping[str, Any],
) -> onnx.ModelProto:
    """Return a model of float32 inputs and outputs, by their shapes, with the shapes of all activations."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    ports = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in of_kind.items()]
             for of_kind in (inputs, outputs))  # fmt: skip
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "tower", *ports, initializer=tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return onnx.shape_inference.infer_shapes(model)


def another_model(bundle: Path, copy: Path) -> Path:
    """Copy a bundle; the image tower of the copy is the same in a different file."""
    shutil.copytree(bundle, copy)
    with (copy / "image.onnx").open("ab") as file:
        file.write(b"\x3a\x00")  # an empty graph, which protobuf merges
    rewrite(copy)
    return copy


def rewrite(bundle: Path, **changes: Any) -> Manifest:
    """Write a bundle's manifest with the checksums of its files now; a dict changes fields of a part, as of a tower."""
    from clip_rd_edge.bundle.manifest import read_manifest, write_manifest

    manifest = read_manifest(bundle)
    for name, value in changes.items():
        changed = msgspec.structs.replace(getattr(manifest, name), **value) if isinstance(value, dict) else value
        manifest = msgspec.structs.replace(manifest, **{name: changed})
    return write_manifest(bundle, manifest)
