"""How a model is made of others: stitched, trimmed, averaged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from clip_rd_edge.settings.options import Settings, argument, option
from clip_rd_edge.utils.paths import AnyPath
from clip_rd_edge.utils.reporting import SILENT, Reporter

Output = Annotated[
    AnyPath, option("Folder for the model.", flags=("-o", "--output"), group="Output", metavar="FOLDER", path=True)
]
Force = Annotated[
    bool, option("Replace an earlier result in FOLDER; a folder with anything else is refused.", group="Output")
]
Templates = str | Sequence[str] | None
Tasks = AnyPath | Any | Iterable[AnyPath | Any]  # names of tasks, or task objects


class _Stitched(Settings, frozen=True):
    classifier: Annotated[str, argument("A timm architecture (`resnet18`, `resnet18.tv_in1k`), or `torchvision:NAME`.")]
    output: Output


class Stitch(_Stitched, frozen=True, kw_only=True):
    """Join an image classifier and a sentence encoder."""

    names: Annotated[
        AnyPath,
        option(
            "The names of the classes: one class per line, in the order of the classifier's outputs; ';' separates "
            "synonyms and descriptions. imagenet: the names of ImageNet's 1,000 classes.",
            group="Text", metavar="FILE|imagenet", complete="imagenet",
        ),
    ]  # fmt: skip
    text: Annotated[
        str,
        option(
            "The sentence encoder: all-MiniLM-L6-v2, a folder or zip archive in the layout of transformers, a name on "
            "the hub, or an open_clip model as local-dir:PATH, whose text tower is used.",
            group="Text", metavar="MODEL",
        ),
    ]  # fmt: skip
    pretrained: Annotated[
        AnyPath,
        option(
            "The classifier's weights (.safetensors, .pth).", group="Classifier", metavar="FILE",
            default="from an installed package, else published ones",
        ),
    ] | None = None  # fmt: skip
    image_size: Annotated[
        int,
        option(
            "Edge of the input images in pixels.", group="Classifier", metavar="PIXELS", default="the classifier's",
            ge=16,
        ),
    ] | None = None  # fmt: skip
    context_length: Annotated[
        int,
        option(
            "Max tokens per text.", group="Text", metavar="TOKENS", default="77, or the encoder's, if fewer", ge=4
        ),
    ] | None = None  # fmt: skip
    force: Force = False
    reporter: Reporter = SILENT


class _Trimmed(Settings, frozen=True):
    model: Annotated[AnyPath, argument("A run's folder, or any open_clip model.")]
    output: Output


class Trim(_Trimmed, frozen=True, kw_only=True):
    """Leave out layers and tokens of a text tower."""

    text_layers: Annotated[
        int,
        option(
            "Keep N layers of the text tower, evenly spaced, the first and the last among them.",
            group="Text", metavar="N", default="all", ge=1,
        ),
    ] | None = None  # fmt: skip
    vocabulary: Annotated[
        int,
        option(
            "Keep N tokens: those that {texts} have most. For CLIP's own text towers, and for those of Hugging Face "
            "with a tokenizer of the kinds WordPiece, Unigram or BPE.",
            group="Text", metavar="N", default="all", ge=1,
        ),
    ] | None = None  # fmt: skip
    texts: Annotated[
        AnyPath,
        option(
            "Texts such as the model will be given, one per line or a table, as for distill.", group="Text",
            metavar="FILE", default="none", path=True,
        ),
    ] | None = None  # fmt: skip
    force: Force = False
    reporter: Reporter = SILENT


class _Averaged(Settings, frozen=True):
    first: Annotated[AnyPath, argument("A run's folder, `local-dir:PATH` or `hf-hub:ORG/REPO`.")]
    second: Annotated[AnyPath, argument("Another model of the same architecture.")]
    output: Output


class Average(_Averaged, frozen=True, kw_only=True):
    """Average the weights of two models."""

    weight: Annotated[
        float | Literal["best"],
        option(
            "Share of the second in the result, from 0 to 1; best: that of the highest mean accuracy on the tasks.",
            group="Weight", metavar="SHARE|best",
        ),
    ] = 0.5  # fmt: skip
    tasks: Annotated[
        Tasks,
        option(
            "Measure the models between the two at every tenth, on this task (see clip-rd-edge evaluate); can be "
            "repeated.",
            flags=("--task",), group="Evaluation", metavar="NAME", default="none", complete="task",
        ),
    ] = ()  # fmt: skip
    templates: Annotated[
        Templates,
        option(
            'Prompt template, such as "a photo of a {}", a file with one per line, or imagenet for CLIP\'s 80; can be '
            "repeated.",
            flags=("--template",), group="Evaluation", metavar="PROMPT|FILE", default="the task's own",
            complete="imagenet",
        ),
    ] = None  # fmt: skip
    force: Force = False
    reporter: Reporter = SILENT
