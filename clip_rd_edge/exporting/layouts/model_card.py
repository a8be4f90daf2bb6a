"""The README of a model in Hugging Face's layout: what it is, its files, figures and prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from clip_rd_edge.benchmarking.report import PLOT, draw, figures_table
from clip_rd_edge.benchmarking.results import Results
from clip_rd_edge.benchmarking.tables import inert_markdown, markdown_table
from clip_rd_edge.bundle.manifest import Manifest
from clip_rd_edge.bundle.runs import DISTILLATION_FILE
from clip_rd_edge.utils.files import size_bytes, write_bytes, write_text

SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_int8"}
VISION, TEXT, BOTH = "vision_model", "text_model", "model"
_CARD = Path(__file__).with_name("model_card.md")  # without a licence on purpose: it is for whoever publishes to say
_SHOWN_PROMPTS = 5
_BILINEAR = """- Lanczos is sharper than the bilinear filter that this model was trained with: transformers.js and
  fastembed embed an image less like open_clip than they do for a bicubic model. Where that matters, resize the
  shorter edge with a bilinear filter first.
"""


def write_model_card(
    folder: Path, manifests: Mapping[str, Manifest], *, results: Results | None, training: Mapping[str, str]
) -> None:
    """Write README.md into a finished folder, and the plot of the results beside it."""
    manifest = manifests["fp32"]
    interpolation = manifest.preprocessing.evaluation_interpolation
    rows = [["", ""], *([f"**{inert_markdown(name)}**", inert_markdown(value)] for name, value in training.items())]
    template = _CARD.read_text(encoding="utf-8")
    if manifest.scoring.is_independent:
        template = re.sub(r"CLIP(Text|Vision)ModelWithProjection", r"Siglip\1Model", template)
    card = Template(template).substitute(
        name=inert_markdown(manifest.name),
        summary=_summary(manifest),
        embedding_size=manifest.embedding_size,
        prompts=_prompts(manifest.templates),
        files=_files_table(folder, manifests),
        figures=_figures(folder, results) if results is not None else "",
        training=f"## Training\n\n{markdown_table(rows, left=range(2))}\n\n" if training else "",
        bilinear=_BILINEAR if interpolation == "bilinear" else "",
        interpolation=interpolation,
        licence=_licence(training),
    )
    write_text(folder / "README.md", card)


def _summary(manifest: Manifest) -> str:
    height, width = manifest.preprocessing.size
    scoring = manifest.scoring
    bias = "" if scoring.bias is None else f", bias {scoring.bias:.4g}, and a sigmoid for each label"
    return (
        f"A CLIP model of {manifest.parameters / 1e6:,.1f} million parameters, exported by clip-rd-edge: images of "
        f"{height} × {width} pixels, texts of up to {manifest.tokenizer.context_length} tokens, embeddings of "
        f"{manifest.embedding_size} numbers, logit scale {manifest.logit_scale:.4g}{bias}."
    )


def _prompts(templates: Sequence[str]) -> str:
    """Return what to put labels into, unless they are embedded as they are."""
    if tuple(templates) == ("{}",):
        return ""
    shown = ", ".join(f'"{inert_markdown(template)}"' for template in templates[:_SHOWN_PROMPTS])
    others = len(templates) - _SHOWN_PROMPTS
    more = f", and {others} more in {DISTILLATION_FILE}" if others > 0 else ""
    mean = " The embedding of a label is the normalised mean over them." if len(templates) > 1 else ""
    return f"\n\nPrompts for labels, in place of {{}}: {shown}{more}.{mean}"


def _files_table(folder: Path, manifests: Mapping[str, Manifest]) -> str:
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


def _figures(folder: Path, results: Results) -> str:
    environment = results.environment
    where = f"Measured on {inert_markdown(environment.machine)}, {environment.date[:10]}, by `clip-rd-edge benchmark`."
    parts = ["## Figures", where, figures_table(results)]
    plot = draw(results, file_format="png")
    if plot is not None:
        write_bytes(folder / PLOT, plot)
        parts.insert(2, f"![Top-1 against the latency of the image tower]({PLOT})")
    return "".join(f"{part}\n\n" for part in parts)


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
