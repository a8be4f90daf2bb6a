"""Models of any kind: open them, build a teacher from parts, upload one."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from clip_rd_edge.errors import UsageError
from clip_rd_edge.utils.calls import checked_call
from clip_rd_edge.utils.paths import AnyPath, as_text
from clip_rd_edge.utils.reporting import SILENT, Reporter
from clip_rd_edge.utils.trust import Typed, typed

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from clip_rd_edge.benchmarking.suite import RowRuntime
    from clip_rd_edge.contract.encoder import TowerEncoder
    from clip_rd_edge.runtime.model import Model


class StitchOptions(TypedDict, total=False):
    """Further options of `stitch` and the command line.

    Keys:
        pretrained: a file of the classifier's weights (.safetensors, .pth). Default: those of an installed package for
            `tf_efficientnet_lite0`, else those that timm or torchvision publishes.
        image_size: edge of the input images in pixels. Default: the classifier's own.
        context_length: tokens per text, at most as many as the sentence encoder supports. Default: 77, or fewer if it
            supports fewer. An open_clip model has its own.
    """

    pretrained: AnyPath | None
    image_size: int | None
    context_length: int | None


@checked_call
def load(
    model: AnyPath,
    *,
    pretrained: AnyPath | None = None,
    threads: int | None = None,
    runtime: RowRuntime | None = None,
    device: str = "auto",
) -> Model:
    """Open a model that classifies and embeds images (paths, PIL images, arrays, or lists of them) and texts.

    Args:
        model: the folder of a bundle, which needs no PyTorch; the folder of a run; or any open_clip model: an
            architecture with `pretrained`, `local-dir:PATH` or `hf-hub:ORG/REPO`.
        pretrained: an open_clip tag or a checkpoint file, if `model` is an architecture.
        threads: number of threads; None uses all cores.
        runtime: `onnxruntime`, `openvino`, `tensorrt`, `litert`, `executorch` or `coreml` for a bundle, None for the
            one it was exported for; `torch` or `torch-compile` for other models.
        device: the device on which ONNX Runtime runs a bundle; see `clip-rd-edge doctor`.

    Raises:
        InputError, ConfigError: the model does not exist or is damaged.
        UsageError: the runtime cannot run the model, the device is not available, or `pretrained` is given for a model
            that has weights of its own.
        MissingExtraError: the model needs a package that is not installed.
    """
    from clip_rd_edge.runtime.model import Model

    weights = as_text(pretrained)
    return Model(open_encoder(typed(model), pretrained=weights, threads=threads, runtime=runtime, device=device))


@checked_call
def stitch(
    classifier: str,
    output: AnyPath,
    *,
    names: AnyPath,
    text: str,
    force: bool = False,
    reporter: Reporter = SILENT,
    **options: Unpack[StitchOptions],
) -> Path:
    """Join an image classifier and a sentence encoder to an open_clip model, and return its folder.

    No image is needed: the projection is computed from the classifier's weights and the embeddings of its class names.
    open_clip loads the folder as `local-dir:PATH`, and `distill` takes it as a teacher. Its bundles start with the
    classes as labels; with `imagenet`, with the labels `everyday`.

    Args:
        classifier: a timm architecture (`resnet18`, `resnet18.tv_in1k`), or `torchvision:NAME`.
        names: a text file with one class per line, in the order of the classifier's outputs, where `;` separates
            synonyms and descriptions; or `imagenet` for its 1,000 classes.
        text: `all-MiniLM-L6-v2`, a folder or zip archive in the layout of transformers, a name on the Hugging Face hub,
            or an open_clip model as `local-dir:PATH`, whose text tower is used.
        force: replace an earlier stitched model in `output`; a folder with anything else is refused.
        options: the other options of `clip-rd-edge stitch`, under the same names.

    Raises:
        UsageError: `output` is in use, or an option is unknown.
        InputError: the classifier, its weights, the names or the sentence encoder do not exist.
        ConfigError: the weights do not match the classifier, the number of names is not that of its classes, or
            open_clip cannot hold one of the two models.
    """
    from clip_rd_edge.contract.checkpoint import LOCAL_DIR
    from clip_rd_edge.contract.outputs import require_output
    from clip_rd_edge.errors import require_known_options
    from clip_rd_edge.utils.files import require_utf8_path

    require_known_options(options, StitchOptions.__annotations__, command="stitch")
    folder = Path(output)
    require_utf8_path(folder)
    read = [Path(os.fspath(name).removeprefix(LOCAL_DIR)) for name in (names, text, options.get("pretrained")) if name]
    require_output(folder, "stitched model", overwrite=force, sources=read)

    from clip_rd_edge.models.load import save_clip
    from clip_rd_edge.models.stitch import IMAGENET, read_class_names, stitch_models
    from clip_rd_edge.runtime.label_list import everyday_labels

    clip, provenance = stitch_models(classifier, Typed(text), read_class_names(names), reporter=reporter, **options)
    if os.fspath(names) == IMAGENET:  # a camera sees few of its 118 breeds of dogs
        clip = replace(clip, labels=tuple(everyday_labels()))
    reporter.update("writing the model")
    save_clip(folder, clip, provenance=provenance, overwrite=force)
    return folder


@checked_call
def trim(
    model: AnyPath,
    output: AnyPath,
    *,
    text_layers: int | None = None,
    vocabulary: int | None = None,
    texts: AnyPath | None = None,
    force: bool = False,
    reporter: Reporter = SILENT,
) -> Path:
    """Write a model with a smaller text tower, a student's start, and return its folder.

    The result embeds images as the model does, and most texts otherwise: `distill` with the model as `teacher`, the
    result as `student` and `texts`, without images, teaches it.

    Args:
        model: a run's folder, `local-dir:PATH`, `hf-hub:ORG/REPO`, or an open_clip architecture with a tag.
        text_layers: how many layers of the text tower stay, evenly spaced. Default: all.
        vocabulary: how many tokens stay, by their use in `texts`; for CLIP's own text towers, and for those of Hugging
            Face whose tokenizer is WordPiece (BERT), Unigram (XLM-R, mT5) or BPE (RoBERTa). Default: all.
        texts: a file such as `distill` takes, with texts such as the model will be given.
        force: replace an earlier trimmed model in `output`; a folder with anything else is refused.

    Raises:
        UsageError: `output` is in use or holds the model, or nothing is to be trimmed.
        InputError: the model or the file of texts does not exist.
        ConfigError: the text tower has no more layers or tokens than that, or cannot be trimmed.
    """
    from clip_rd_edge.contract.checkpoint import model_folder
    from clip_rd_edge.contract.outputs import require_output
    from clip_rd_edge.data.unpaired import load_texts
    from clip_rd_edge.runtime.label_list import read_texts
    from clip_rd_edge.utils.files import require_utf8_path

    folder, spec = Path(output), typed(model)
    require_utf8_path(folder)
    source = model_folder(spec)
    require_output(folder, "trimmed model", overwrite=force, sources=[source] if source else [])
    lines = load_texts(typed(texts), "title", read_texts) if texts is not None else []

    from clip_rd_edge.models.text.trim import write_trimmed

    write_trimmed(
        spec, folder, layers=text_layers, vocabulary=vocabulary, texts=lines, overwrite=force, reporter=reporter
    )
    return folder


def open_encoder(
    spec: Typed,
    *,
    pretrained: Typed | None = None,
    threads: int | None = None,
    runtime: RowRuntime | None = None,
    device: str = "auto",
) -> TowerEncoder:
    """Open a bundle without PyTorch, or another model with it; arguments and errors as for `load`."""
    from clip_rd_edge.contract.bundle import is_bundle
    from clip_rd_edge.contract.checkpoint import LOCAL_DIR, model_folder, refuse_other_weights

    path = Path(spec.removeprefix(LOCAL_DIR))
    if is_bundle(path):
        refuse_other_weights(spec, pretrained)
        if runtime == "torch" or runtime == "torch-compile":
            raise UsageError(f"{spec} is a bundle, which torch cannot run.", hint="pass the model it was exported from")
        from clip_rd_edge.runtime.load import load as load_bundle

        return load_bundle(path, threads=threads, runtime=runtime, device=device)
    if runtime not in (None, "torch", "torch-compile"):
        raise UsageError(f"{spec} is not a bundle: {runtime} cannot run it.", hint="export it with clip-rd-edge export")
    from clip_rd_edge.models.encoder import CompiledEncoder, TorchEncoder
    from clip_rd_edge.models.load import load_clip
    from clip_rd_edge.runtime.backends.session import require_threads

    require_threads(threads)
    kind = CompiledEncoder if runtime == "torch-compile" else TorchEncoder
    return kind(load_clip(spec, pretrained=pretrained), folder=model_folder(spec), threads=threads)


def first_answer(spec: str, runtime: RowRuntime | None, threads: int) -> list[str]:
    """Return the command of a process that classifies one image, to time a cold start; append the image's path."""
    return [sys.executable, "-m", "clip_rd_edge.cli._first_answer", spec, runtime or "", str(threads)]
