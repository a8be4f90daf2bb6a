"""Convert a model's towers to ONNX in float32, or by another toolchain, whose files are compared with those."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import onnx
import torch
from torch import Tensor, nn

from clip_rd_edge.bundle.manifest import IMAGE_MODEL, TEXT_MODEL, TOKENIZER, Tower
from clip_rd_edge.errors import ClipRdEdgeError, first_line
from clip_rd_edge.exporting.clean_up import clean_up
from clip_rd_edge.exporting.graph import silently
from clip_rd_edge.exporting.parity import Inputs, measure, require_agreement
from clip_rd_edge.models.clip import ClipModel, ImageTower, TextTower, evaluation_mode, inference_image_tower
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.utils.files import disk_full_error, write_bytes
from clip_rd_edge.utils.process import SharedBlock, quiet_logs

if TYPE_CHECKING:
    from clip_rd_edge.exporting.formats import Converted, Job

OPSET = 18  # the exporter's default; it writes others by conversion, and LayerNormalization needs at least 17
IMAGE_INPUT, IMAGE_OUTPUT = "pixel_values", "image_embedding"
# Not `embedding`: the text tower has a node of that name for its token embeddings.
TEXT_INPUT, TEXT_OUTPUT = "input_ids", "text_embedding"
# Of the weights in an ONNX file; a protobuf file ends at 2 GiB. Those of a larger tower are written to a file of their
# own, which torch names image.onnx.data or text.onnx.data.
MAX_FILE_BYTES = 2_000_000_000
# With a batch of 1, the exporter would treat the batch size as a constant.
_EXAMPLE_BATCH = 2
TOWERS: dict[str, Callable[[nn.Module], nn.Module]] = {"image": inference_image_tower, "text": TextTower}
OTHER_FORMAT = "use {format} onnx, which ONNX Runtime runs on phones as well"


def export_image_tower(clip: ClipModel, folder: Path) -> Path:
    """Write image.onnx: pixel_values (N, 3, H, W) float32 -> image_embedding (N, D), L2-normalised."""
    height, width = clip.preprocessing.size
    example = torch.zeros(_EXAMPLE_BATCH, 3, height, width)
    tower, names = inference_image_tower(clip.model), (IMAGE_INPUT, IMAGE_OUTPUT)
    return _export(tower, example, folder / IMAGE_MODEL, names=names, clip=clip)


def export_text_tower(clip: ClipModel, folder: Path) -> Path:
    """Write text.onnx: input_ids (N, T) int64 -> text_embedding (N, D), L2-normalised."""
    example = clip.tokenizer(["a photo"] * _EXAMPLE_BATCH)
    tower, names = _Int32TextTower(clip.model), (TEXT_INPUT, TEXT_OUTPUT)
    return _export(tower, example, folder / TEXT_MODEL, names=names, clip=clip)


class _Int32TextTower(TextTower):
    """The text tower that computes with int32 ids.

    It finds the end of a text as the position of the largest id, and ONNX Runtime before 1.20 has no ArgMax of int64.
    """

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids.to(torch.int32))


def _export(tower: nn.Module, example: Tensor, path: Path, *, names: tuple[str, str], clip: ClipModel) -> Path:
    example = example.to(next(tower.parameters()).device)
    is_large = _weight_bytes(tower) > MAX_FILE_BYTES
    with converting("torch", path.stem, clip, hint="use one of clip-rd-edge's presets, or a newer torch"):
        # It tries several ways to trace a tower, and torch 2.8 logs a traceback as an error where one of them fails.
        with evaluation_mode(tower), NO_FAST_PATH, silently(), quiet_logs(logging.ERROR), torch.no_grad():
            torch.onnx.export(
                tower,
                (example,),
                str(path),
                input_names=[names[0]],
                output_names=[names[1]],
                opset_version=OPSET,
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                external_data=is_large,
                verbose=False,
            )
        model = onnx.load(path, load_external_data=False)
        clean_up(model)
        onnx.save(model, path)
        onnx.checker.check_model(path)
    return path


def _weight_bytes(tower: nn.Module) -> int:
    """Return the size of the weights that a tower's file has: its module holds the whole model."""
    of_image = isinstance(tower, ImageTower)
    weights = tower.state_dict().items()
    return sum(tensor.nbytes for name, tensor in weights if name.startswith("model.visual.") == of_image)


@contextlib.contextmanager
def converting(tool: str, tower: str, clip: ClipModel, *, hint: str = OTHER_FORMAT) -> Iterator[None]:
    """Within the block, a converter's failure becomes one sentence: its reports are pages long, its types many."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # which a converter's own errors hide
            cause = cause.__cause__
        # torch's exporter is written with onnxscript, which torch does not require: pip may have kept an old one.
        if tool == "torch" and isinstance(cause, ImportError):
            hint = "pip install -U onnxscript"
        raise disk_full_error(error) or ClipRdEdgeError(
            f"{tool} cannot convert the {tower} tower of {clip.name}: {type(cause).__name__}: {first_line(cause)}.",
            hint=hint,
        ) from error


@contextlib.contextmanager
def _without_fast_path() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


# Disables the fused attention, which becomes `aten::_native_multi_head_attention` and does not exist in ONNX.
NO_FAST_PATH = SharedBlock(_without_fast_path)


@contextlib.contextmanager
def on_cpu(module: nn.Module) -> Iterator[nn.Module]:
    """Move a module to the CPU to be traced, without the messages of what traces it; afterwards it is as it was."""
    device = next(module.parameters()).device
    with evaluation_mode(module), NO_FAST_PATH, silently(), torch.no_grad():
        try:
            yield module.cpu()
        finally:
            module.to(device)


def example_row(inputs: Inputs) -> Tensor:
    """Return the first of a tower's inputs (1, …), token ids as int32."""
    example = torch.from_numpy(inputs[:1])
    return example if example.is_floating_point() else example.to(torch.int32)


@dataclass(frozen=True)
class Toolchain:
    """What converts towers to a format, and what runs them.

    Attributes:
        convert: returns the content of a file from the model, the name of a tower, its ONNX file's manifest entry, and
            inputs whose first row is an example; the file takes one input at a time.
        open: opens a file, given its path and `threads`, as an object with the methods `get_inputs()` and
            `run(names, feed)` of an ONNX Runtime session.
    """

    title: str
    target: str
    suffix: str
    convert: Callable[[ClipModel, str, Tower, Inputs], bytes]
    open: Callable[..., Any]


def write_towers(job: Job, tools: Toolchain) -> Converted:
    """Write a model's towers in float32 into the job's folder.

    Latency is measured against the float32 ONNX files of the job's source, with which the answers are compared.
    """
    threads = job.plan.threads

    def convert(name: str, tower: Tower) -> Tower:
        path = job.folder / f"{name}{tools.suffix}"
        write_bytes(path, tools.convert(job.clip, name, tower, job.inputs[name]))
        reference = open_session(str(job.source / tower.file), threads=threads)
        session = tools.open(str(path), threads=threads)
        measured = measure(session, reference, job.inputs[name], threads=threads)
        require_agreement(path.name, measured, hint=OTHER_FORMAT)
        note = ""
        if measured.speedup < 1:
            note = f"fp32: {tools.title} takes {1 / measured.speedup:.2f} times as long here as ONNX Runtime."
        return msgspec.structs.replace(tower, file=path.name, one_at_a_time=True, note=note, measured=measured)

    return job.convert_towers(convert, doing=f"converting to {tools.title}", target=tools.target)


@contextlib.contextmanager
def from_own_float32(job: Job, tools: Toolchain) -> Iterator[Job]:
    """Write both towers in float32 by a toolchain; yield the job that converts those, until the end of the block."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shutil.copyfile(job.source / TOKENIZER, folder / TOKENIZER)
        whole = replace(job, folder=folder, plan=replace(job.plan, text_tower=True))
        yield replace(job, source=folder, fp32=write_towers(whole, tools).manifest)
