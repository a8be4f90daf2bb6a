"""The model card of an export for the Hugging Face hub: README.md, with what the exporter knows of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from clip_rd_edge.benchmarking.formatting import inert_markdown, markdown_table
from clip_rd_edge.benchmarking.report.plot import draw
from clip_rd_edge.benchmarking.report.text import PLOT, figures_table
from clip_rd_edge.benchmarking.results import Results
from clip_rd_edge.bundle.manifest import Manifest
from clip_rd_edge.bundle.preprocess import Preprocessing
from clip_rd_edge.bundle.runs import DISTILLATION_FILE
from clip_rd_edge.exporting.layouts.huggingface import BOTH, SUFFIXES, TEXT, VISION, Variant
from clip_rd_edge.utils.files import size_bytes, write_bytes, write_text

_CARD = "README.md"
_SHOWN_PROMPTS = 5
# `license` is missing on purpose: it is for whoever publishes the model to say.
_HEADER = """---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags:
- clip
- open_clip
- onnx
- transformers.js
- zero-shot-image-classification
---"""
_USE = """```python
import open_clip

# from a local folder: "local-dir:PATH"
model, _, preprocess = open_clip.create_model_and_transforms("hf-hub:ORG/REPO")
tokenizer = open_clip.get_tokenizer("hf-hub:ORG/REPO")
```

```js
import { AutoProcessor, AutoTokenizer, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, RawImage }
  from '@huggingface/transformers';

const tokenizer = await AutoTokenizer.from_pretrained('ORG/REPO');
const textModel = await CLIPTextModelWithProjection.from_pretrained('ORG/REPO', { dtype: 'fp32' });
const { text_embeds } = await textModel(tokenizer(['a photo of a cat'], { padding: true, truncation: true }));

const processor = await AutoProcessor.from_pretrained('ORG/REPO');
const visionModel = await CLIPVisionModelWithProjection.from_pretrained('ORG/REPO', { dtype: 'fp32' });
const { image_embeds } = await visionModel(await processor(await RawImage.read('photo.jpg')));
```

```python
from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType

TextEmbedding.add_custom_model(
    "ORG/REPO", pooling=PoolingType.DISABLED, normalization=False, sources=ModelSource(hf="ORG/REPO"),
    dim=EMBEDDING_SIZE, model_file="onnx/text_model.onnx",
)
texts = list(TextEmbedding("ORG/REPO").embed(["a photo of a cat"]))
```

Embeddings are L2-normalised: their dot product is the cosine. The ONNX files take texts of any length up to the
context length, in batches; transformers.js takes FP32 by default, FP16 by `dtype: 'fp16'`, and INT8, if it is there,
by `dtype: 'int8'`."""
_LIMITS = """- open_clip resizes images with a INTERPOLATION filter, transformers.js and fastembed with Lanczos as
  `preprocessor_config.json` says: in Node, transformers.js has no INTERPOLATION filter that suits large images. Their
  crop may differ by one pixel from open_clip's.
- clip-rd-edge lays transparent images on white. transformers, transformers.js, fastembed and open_clip drop the
  transparency, and the colours beneath it show: lay such images on white first.
- The tokenizer file does not decode HTML entities, convert full-width letters or repair wrong encodings, as open_clip
  does.
- What the model recognises is what its training data show; nothing else was tested."""

_BILINEAR = """- Lanczos is sharper than the bilinear filter that this model was trained with: transformers.js and
  fastembed embed an image less like open_clip than they do for a bicubic model. Where that matters, resize the
  shorter edge with a bilinear filter first."""


def write_model_card(
    folder: Path,
    manifests: Mapping[Variant, Manifest],
    *,
    results: Results | None,
    training: Mapping[str, str],
) -> None:
    """Write README.md into a finished folder, and the plot of the results beside it.

    Args:
        manifests: of the exported bundles by precision.
        results: a report of the model, or None.
        training: facts about the training by name, such as the teacher and the data.
    """
    manifest = manifests["fp32"]
    parts = [_HEADER, f"# {inert_markdown(manifest.name)}", _summary(manifest), "## Use"]
    parts += [_USE.replace("EMBEDDING_SIZE", str(manifest.embedding_size))]
    parts += _prompts(manifest.templates)
    parts += ["## Files", _files_table(folder, manifests)]
    parts += ["Agreement is the mean cosine with the float32 embeddings, each side centred, as measured by the export."]
    if results is not None:
        parts += ["## Figures", *_figures(folder, results)]
    if training:
        rows = [["", ""], *([f"**{inert_markdown(name)}**", inert_markdown(value)] for name, value in training.items())]
        parts += ["## Training", markdown_table(rows, left=range(2))]
    parts += ["## Limits", _limits(manifest.preprocessing), "## Licence", _licence(training)]
    write_text(folder / _CARD, "\n\n".join(parts) + "\n")


def _summary(manifest: Manifest) -> str:
    height, width = manifest.preprocessing.size
    return (
        f"A CLIP model of {manifest.parameters / 1e6:,.1f} million parameters, exported by clip-rd-edge: images of "
        f"{height} × {width} pixels, texts of up to {manifest.tokenizer.context_length} tokens, embeddings of "
        f"{manifest.embedding_size} numbers, logit scale {manifest.logit_scale:.4g}."
    )


def _prompts(templates: Sequence[str]) -> list[str]:
    """Return what to put labels into, unless they are embedded as they are."""
    if tuple(templates) == ("{}",):
        return []
    shown = ", ".join(f'"{inert_markdown(template)}"' for template in templates[:_SHOWN_PROMPTS])
    others = len(templates) - _SHOWN_PROMPTS
    more = f", and {others} more in {DISTILLATION_FILE}" if others > 0 else ""
    mean = " The embedding of a label is the normalised mean over them." if len(templates) > 1 else ""
    return [f"Prompts for labels, in place of {{}}: {shown}{more}.{mean}"]


def _files_table(folder: Path, manifests: Mapping[Variant, Manifest]) -> str:
    rows = [["Precision", "Tower", "File", "MB", "Computes in", "Agreement"]]
    for variant, manifest in manifests.items():
        for name, tower in ((VISION, manifest.image), (TEXT, manifest.text), (BOTH, None)):
            file = f"onnx/{name}{SUFFIXES[variant]}.onnx"
            measured = tower.measured if tower is not None else None
            rows.append(
                [
                    variant,
                    {VISION: "image", TEXT: "text", BOTH: "both"}[name],
                    f"`{file}`",
                    f"{size_bytes(folder / file) / 1e6:,.1f}",
                    "" if tower is None else inert_markdown(tower.precision),
                    "" if measured is None else f"{measured.centred_cosine:.4f}",
                ]
            )
    return markdown_table(rows, left=range(3))


def _figures(folder: Path, results: Results) -> list[str]:
    environment = results.environment
    where = f"Measured on {inert_markdown(environment.machine)}, {environment.date[:10]}, by `clip-rd-edge benchmark`."
    parts = [where, figures_table(results)]
    plot = draw(results, file_format="png")
    if plot is not None:
        write_bytes(folder / PLOT, plot)
        parts.insert(1, f"![Top-1 against the latency of the image tower]({PLOT})")
    return parts


def _limits(preprocessing: Preprocessing) -> str:
    interpolation = preprocessing.evaluation_interpolation
    limits = _LIMITS.replace("INTERPOLATION", interpolation)
    return f"{_BILINEAR}\n{limits}" if interpolation == "bilinear" else limits


def _licence(training: Mapping[str, str]) -> str:
    text = (
        "The export sets no licence for the weights; add `license:` to the header above before publishing. Weights are "
        "derived from the teacher and the data that they were trained on, whose licences may bind them."
    )
    if "emoji" not in (training.get("data"), training.get("image_source")):
        return text
    return (
        f"{text} The built-in emoji data are Twemoji graphics (© Twitter, Inc. and other contributors, CC BY 4.0) and "
        "OpenMoji graphics (© OpenMoji, CC BY-SA 4.0), changed: laid on white, scaled."
    )
