"""A model as a float32 bundle, each file checked against the model that it came from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from clip_rd_edge.contract.bundle import FORMAT_VERSION, IMAGE_MODEL, TEXT_MODEL, TOKENIZER, Manifest, Tower
from clip_rd_edge.contract.encoder import Embeddings
from clip_rd_edge.contract.tokenizer import TokenIds, Tokenizer, TokenizerSpec
from clip_rd_edge.errors import ClipRdEdgeError
from clip_rd_edge.exporters.measure import Inputs, embed, latencies, measurement
from clip_rd_edge.exporters.onnx import (
    IMAGE_INPUT,
    IMAGE_OUTPUT,
    TEXT_INPUT,
    TEXT_OUTPUT,
    evaluating,
    export_image_tower,
    export_text_tower,
)
from clip_rd_edge.exporters.parity import agreement
from clip_rd_edge.exporters.probes import PROBES
from clip_rd_edge.exporters.tokenizer import export_tokenizer
from clip_rd_edge.models.clip import ClipModel, parameter_count
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.runtime.backends.onnxruntime import open_session

MAX_DIFFERENCE, LEAST_COSINE = 1e-4, 0.99999
TARGET = "onnxruntime"


def write_fp32(
    clip: ClipModel, folder: Path, *, provenance: dict[str, str], threads: int, progress: Callable[[str], None]
) -> Manifest:
    """Write both towers and the tokenizer into `folder`, and return their manifest, not yet written.

    Raises:
        ClipRdEdgeError: a tower cannot be exported, or the file does not do what the model does.
    """
    with evaluating(clip.model):
        progress("exporting the image tower")
        export_image_tower(clip, folder)
        progress("exporting the text tower")
        export_text_tower(clip, folder)
        spec = export_tokenizer(clip.tokenizer, folder)
        progress("comparing with torch")
        ids = _same_ids(clip, folder / TOKENIZER, spec)
        height, width = clip.preprocessing.size
        pixels = np.random.default_rng(0).standard_normal((len(PROBES), 3, height, width)).astype(np.float32)
        encoder = TorchEncoder(clip)
        image = _checked(
            folder / IMAGE_MODEL, pixels, encoder.encode_pixels(pixels), (IMAGE_INPUT, IMAGE_OUTPUT), threads
        )
        text = _checked(folder / TEXT_MODEL, ids, encoder.encode_ids(ids), (TEXT_INPUT, TEXT_OUTPUT), threads)
    return Manifest(
        format_version=FORMAT_VERSION,
        name=clip.name,
        precision="fp32",
        target=TARGET,
        embedding_size=clip.embedding_size,
        logit_scale=clip.logit_scale,
        preprocessing=clip.preprocessing,
        tokenizer=spec,
        image=image,
        text=text,
        templates=clip.templates,
        parameters=parameter_count(clip.model),
        provenance=provenance,
    )


def _same_ids(clip: ClipModel, path: Path, spec: TokenizerSpec) -> TokenIds:
    """Token ids of the probes, which both tokenizers must agree on."""
    expected = clip.tokenizer(list(PROBES)).numpy()
    ids = Tokenizer(path, spec)(PROBES)
    for text, row, expected_row in zip(PROBES, ids, expected, strict=True):
        if not np.array_equal(row, expected_row):
            raise ClipRdEdgeError(
                f"The exported tokenizer of {clip.name} reads {text[:40]!r} as {row.tolist()[:12]}; "
                f"open_clip's reads it as {expected_row.tolist()[:12]}."
            )
    return ids


def _checked(path: Path, inputs: Inputs, expected: Embeddings, names: tuple[str, str], threads: int) -> Tower:
    session = open_session(str(path), threads=threads)
    for batch_size in (1, len(inputs)):
        found = agreement(expected, embed(session, inputs, batch_size=batch_size))
        if not (found.max_difference <= MAX_DIFFERENCE and found.cosine >= LEAST_COSINE):
            raise ClipRdEdgeError(
                f"{path.name} does not do what the model does at batch {batch_size}: greatest difference "
                f"{found.max_difference:.2g} (at most {MAX_DIFFERENCE:g} expected), cosine {found.cosine:.6f} "
                f"(at least {LEAST_COSINE} expected).",
                hint="a newer torch may export this architecture better",
            )
    times = latencies({"fp32": session}, inputs)["fp32"]
    return Tower(
        file=path.name,
        input_name=names[0],
        output_name=names[1],
        precision="fp32",
        measured=measurement(found, times, reference=times, threads=threads),
    )
