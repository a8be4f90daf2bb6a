"""Models of any kind: open them, build a teacher from parts, upload one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_rd_edge.api.exporting import place_of
from clip_rd_edge.errors import UsageError
from clip_rd_edge.settings.options import keywords_of
from clip_rd_edge.settings.training import Stitch, Trim
from clip_rd_edge.utils.paths import AnyPath, Typed, as_text, several, typed

if TYPE_CHECKING:
    from clip_rd_edge.benchmarking.suite import RowRuntime
    from clip_rd_edge.bundle.encoder import TowerEncoder
    from clip_rd_edge.runtime.model import Model


def load(
    model: AnyPath,
    *,
    pretrained: AnyPath | None = None,
    threads: int | None = None,
    runtime: RowRuntime | None = None,
    device: str = "auto",
    force: bool = False,
) -> Model:
    """Open a model that classifies and embeds images (paths, PIL images, arrays, or lists of them) and texts.

    Args:
        model: the folder of a bundle, which needs no PyTorch; `everyday`, which is built in; the folder of a run; or
            any open_clip model: an architecture with `pretrained`, `local-dir:PATH` or `hf-hub:ORG/REPO`.
        pretrained: an open_clip tag or a checkpoint file, if `model` is an architecture.
        threads: number of threads; None uses all cores.
        runtime: `onnxruntime`, `openvino`, `tensorrt`, `litert`, `executorch` or `coreml` for a bundle, None for the
            one it was exported for; `torch` for other models.
        device: the device on which ONNX Runtime runs a bundle; see `clip-rd-edge doctor`.
        force: run a bundle whose INT8 this processor computes wrongly, with a warning; otherwise its first use raises a
            UsageError.

    Raises:
        InputError, ConfigError: the model does not exist or is damaged.
        UsageError: the runtime cannot run the model, the device is not available, or `pretrained` is given for a model
            that has weights of its own.
        MissingExtraError: the model needs a package that is not installed.
    """
    from clip_rd_edge.runtime.model import Model

    weights = as_text(pretrained)
    encoder = open_encoder(
        typed(model), pretrained=weights, threads=threads, runtime=runtime, device=device, force=force
    )
    return Model(encoder)


def import_modules(modules: AnyPath | Sequence[AnyPath]) -> None:
    """Run Python files or modules of the user's own, which register models of timm."""
    for source in several(modules):
        from clip_rd_edge.losses.terms import load_terms

        load_terms(source)


@keywords_of(Stitch)
def stitch(request: Stitch) -> Path:
    """Join an image classifier and a sentence encoder to an open_clip model, and return its folder.

    No image is needed: the projection is computed from the classifier's weights and the embeddings of its class names.
    open_clip loads the folder as `local-dir:PATH`, and `distill` takes it as a teacher. Its bundles have the classes as
    labels, or the labels `everyday` if `names` is `imagenet`.

    Raises:
        UsageError: `output` is in use.
        InputError: the classifier, its weights, the names or the sentence encoder do not exist.
        ConfigError: the weights do not match the classifier, the number of names is not that of its classes, or
            open_clip cannot hold one of the two models.
    """
    from clip_rd_edge.bundle.outputs import require_output
    from clip_rd_edge.bundle.runs import LOCAL_DIR

    folder, given = Path(request.output), (request.names, request.text, request.pretrained)
    read = [Path(os.fspath(name).removeprefix(LOCAL_DIR)) for name in given if name]
    require_output(folder, "stitched model", overwrite=request.force, sources=read)

    from clip_rd_edge.models.load import save_clip
    from clip_rd_edge.models.stitch import IMAGENET, read_class_names, stitch_models
    from clip_rd_edge.runtime.labels import everyday_labels

    clip, provenance = stitch_models(
        request.classifier, Typed(request.text), read_class_names(request.names), pretrained=request.pretrained,
        image_size=request.image_size, context_length=request.context_length, reporter=request.reporter,
    )  # fmt: skip
    if os.fspath(request.names) == IMAGENET:  # a camera sees few of its 118 breeds of dogs
        clip = replace(clip, labels=tuple(everyday_labels()))
    request.reporter.update("writing the model")
    save_clip(folder, clip, provenance=provenance, overwrite=request.force)
    return folder


@keywords_of(Trim)
def trim(request: Trim) -> Path:
    """Write a copy of a model with a smaller text tower, as the start of a student, and return its folder.

    The copy embeds images as the model does, and most texts differently. To teach it the model's text embeddings, call
    `distill` with the model as `teacher`, the copy as `student`, and `texts` without images.

    Raises:
        UsageError: `output` is in use or holds the model, or nothing is to be trimmed.
        InputError: the model or the file of texts does not exist.
        ConfigError: the text tower has no more layers or tokens than are to stay, or cannot be trimmed.
    """
    from clip_rd_edge.bundle.outputs import require_output
    from clip_rd_edge.bundle.runs import model_folder
    from clip_rd_edge.data.load import load_texts
    from clip_rd_edge.runtime.labels import read_texts

    folder, spec = Path(request.output), typed(request.model)
    source = model_folder(spec)
    require_output(folder, "trimmed model", overwrite=request.force, sources=[source] if source else [])
    lines = load_texts(typed(request.texts), "title", read_texts) if request.texts is not None else []

    from clip_rd_edge.models.edit import write_trimmed

    write_trimmed(
        spec, folder, layers=request.text_layers, vocabulary=request.vocabulary, texts=lines, overwrite=request.force,
        reporter=request.reporter,
    )  # fmt: skip
    return folder


def open_encoder(
    spec: Typed,
    *,
    pretrained: Typed | None = None,
    threads: int | None = None,
    runtime: RowRuntime | None = None,
    device: str = "auto",
    force: bool = False,
) -> TowerEncoder:
    """Open a bundle without PyTorch, or another model with it; arguments and errors as for `load`."""
    from clip_rd_edge.models.names import parse_name

    spec = typed(place_of(spec))
    named = parse_name(spec, weights=pretrained)
    if named.kind == "bundle":
        from clip_rd_edge.runtime.load import load as load_bundle

        return load_bundle(Path(named.name), threads=threads, runtime=runtime, device=device, force=force)
    if runtime not in (None, "torch"):
        raise UsageError(f"{spec} is not a bundle: {runtime} cannot run it.", hint="export it with clip-rd-edge export")
    from clip_rd_edge.models.clip import inference_image_tower
    from clip_rd_edge.models.encoder import TorchEncoder
    from clip_rd_edge.models.load import load_clip
    from clip_rd_edge.runtime.encoder import require_threads

    require_threads(threads)
    clip, folder = load_clip(spec, pretrained=pretrained), Path(named.name) if named.kind == "folder" else None
    return TorchEncoder(clip, folder=folder, image_tower=inference_image_tower(clip.model), threads=threads)


def first_answer(spec: str, runtime: RowRuntime | None, threads: int) -> list[str]:
    """Return the command of a process that classifies one image, to time a cold start; append the image's path."""
    code = f"from {__name__} import answer_once; answer_once()"
    return [sys.executable, "-c", code, spec, runtime or "", str(threads)]


def answer_once() -> None:
    """Embed an image and, if the model can, a text; then print one line of JSON: the process of `first_answer`."""
    from clip_rd_edge.bundle.encoder import embeds_texts
    from clip_rd_edge.bundle.images import open_image
    from clip_rd_edge.utils.host import peak_memory_bytes

    model, runtime_name, threads, image = sys.argv[1:]
    runtime: Any = runtime_name or None
    encoder = open_encoder(typed(model), runtime=runtime, threads=int(threads))
    encoder.encode_images([open_image(Path(image))])
    if embeds_texts(encoder):
        encoder.encode_texts(["a photo of a cat"])
    print(json.dumps({"peak_memory_bytes": peak_memory_bytes()}), flush=True)
