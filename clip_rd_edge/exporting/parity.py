"""Compare embeddings of the same inputs, time towers in turn, and add reference embeddings to a bundle."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from PIL import Image

from clip_rd_edge.bundle.encoder import Embeddings, in_batches
from clip_rd_edge.bundle.manifest import TOKENIZER, Manifest, Measurement, Tower
from clip_rd_edge.bundle.preprocess import Pixels, Preprocessing
from clip_rd_edge.bundle.reference import Reference, reference_images, worst_agreement, write_reference
from clip_rd_edge.bundle.tokenizer import Tokenizer
from clip_rd_edge.errors import ClipRdEdgeError
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.utils.host import machine_name
from clip_rd_edge.utils.timing import Milliseconds, time_in_turn

MAX_DIFFERENCE, MIN_COSINE = 1e-4, 0.99999  # of a float32 file's embeddings from the model's
Inputs = npt.NDArray[np.float32] | npt.NDArray[np.int64]
Matrix = npt.NDArray[np.float64]
Matches = npt.NDArray[np.bool_]


class Agreement(NamedTuple):
    """Agreement of N embeddings with N reference embeddings.

    Attributes:
        centred_cosine: the same after subtracting each side's mean embedding. CLIP embeddings share a large mean, so
            the raw cosine stays near 1 even if a tower has collapsed to that mean.
    """

    max_difference: float
    cosine: float
    centred_cosine: float
    samples: int


def agreement(reference: Embeddings, other: Embeddings) -> Agreement:
    """Compare two sets of embeddings, both (N, D) with N of 2 or more, row by row.

    If any value is not finite, the cosines are 0 and the max difference is infinite.
    """
    # float16 overflow and bad scales give NaN, which would otherwise pass every `<` that guards a threshold.
    if not (np.isfinite(reference).all() and np.isfinite(other).all()):
        return Agreement(float("inf"), 0.0, 0.0, len(reference))
    a, b = reference.astype(np.float64), other.astype(np.float64)
    return Agreement(
        max_difference=float(np.abs(a - b).max()),
        cosine=_mean_cosine(a, b),
        centred_cosine=_mean_cosine(a - a.mean(axis=0), b - b.mean(axis=0)),
        samples=len(a),
    )


def require_agreement(file: str, found: Agreement | Measurement, *, hint: str) -> None:
    """Raise ClipRdEdgeError if a float32 file's embeddings are not the model's."""
    if not (found.max_difference <= MAX_DIFFERENCE and found.cosine >= MIN_COSINE):
        raise ClipRdEdgeError(
            f"{file} differs from the model: max difference {found.max_difference:.2g} (expected at most "
            f"{MAX_DIFFERENCE:g}), cosine {found.cosine:.6f} (expected at least {MIN_COSINE}).",
            hint=hint,
        )


def top1_matches(images: Embeddings, captions: Embeddings) -> Matches:
    """Return, for each of N images, whether its own caption is the nearest of all N; both (N, D), one pair per row.

    A caption that several pairs share counts as each one's own.
    """
    similarities = images.astype(np.float64) @ captions.astype(np.float64).T
    own = np.diagonal(similarities)
    matches: Matches = own >= similarities.max(axis=1) - 1e-6  # rounding makes equal captions differ slightly
    return matches


def _mean_cosine(a: Matrix, b: Matrix) -> float:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.mean(np.sum(a * b, axis=1) / np.maximum(norms, 1e-24)))


# Texts that towers and tokenizers are compared on: short, long, too long, empty, and known pitfalls of tokenizers.
HARD_TEXTS = (
    "a photo of a cat",
    "",
    "two dogs, running through tall grass at the edge of a lake",
    "it's 1984 &amp; they'll  meet — don't you?",
    "Überraschung! 猫と犬 👩‍🚀 café",
    "red",
    "!<end_of_text> <end_of_text> <start_of_text>",
    " ".join(map(str, range(300))),  # of different words, so that it shows which of them are cut off
)


def hard_pixels(preprocessing: Preprocessing) -> Pixels:
    """Return preprocessed images (8, 3, H, W) that reach the extremes of what an image can contain.

    White, black, red, checkerboards of 1 and of 16 pixels, binary noise, uniform noise, a gradient.
    """
    height, width = preprocessing.size
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width]
    red = np.asarray([1, 0, 0])[:, None, None]
    noise = rng.integers(0, 2, (3, height, width)), rng.uniform(0, 1, (3, height, width))
    checkerboards = ((rows // edge + columns // edge) % 2 for edge in (1, 16))
    kinds = (np.ones(1), np.zeros(1), red, *checkerboards, *noise, columns / max(width - 1, 1))
    images = np.stack([np.broadcast_to(kind, (3, height, width)) for kind in kinds])
    mean, std = (np.asarray(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    pixels: Pixels = ((images - mean) / std).astype(np.float32)
    return pixels


def hard_inputs(bundle: Path, manifest: Manifest) -> dict[str, Inputs]:
    """Return hard inputs of a bundle's image tower and text tower."""
    ids = Tokenizer(bundle / TOKENIZER, manifest.tokenizer)(HARD_TEXTS)
    return {"image": hard_pixels(manifest.preprocessing), "text": ids}


_TEXTS_AT_ONCE = 16


def embed(session: Any, inputs: Inputs, *, batch_size: int | None = None) -> Embeddings:
    """Run a tower in batches and return the embeddings (N, D) of its N inputs.

    By default, images run one by one: several take that many times the memory, and on a CPU hardly less time.
    """
    name = session.get_inputs()[0].name
    batch_size = batch_size or (_TEXTS_AT_ONCE if inputs.ndim == 2 else 1)
    parts = [session.run(None, {name: inputs[batch]})[0] for batch in in_batches(len(inputs), batch_size)]
    embeddings: Embeddings = np.concatenate(parts)
    return embeddings


def latencies(sessions: Mapping[str, Any], inputs: Inputs, **limits: Any) -> Mapping[str, Milliseconds]:
    """Return the latencies, in milliseconds, of each session on the first input, batch 1, all timed in turn."""
    feeds = {name: {session.get_inputs()[0].name: inputs[:1]} for name, session in sessions.items()}
    return time_in_turn({name: partial(sessions[name].run, None, feed) for name, feed in feeds.items()}, **limits)


def p10(latencies_ms: Milliseconds) -> float:
    """Return the 10th percentile, which candidates are compared by.

    On a busy machine, nearly every run that is longer than a time slice is interrupted, and its median then reflects
    the other programs.
    """
    return float(np.percentile(latencies_ms, 10))


def measurement(
    agreement: Agreement, latencies_ms: Milliseconds, *, reference_ms: Milliseconds, threads: int
) -> Measurement:
    """Return a tower's figures as the manifest stores them, with its latencies and those of float32, timed in turn."""
    return Measurement(
        latency_ms_p50=float(np.median(latencies_ms)),
        latency_ms_p95=float(np.percentile(latencies_ms, 95)),
        speedup=p10(reference_ms) / p10(latencies_ms),
        max_difference=agreement.max_difference,
        cosine=agreement.cosine,
        centred_cosine=agreement.centred_cosine,
        samples=agreement.samples,
        threads=threads,
        machine=machine_name(),
    )


def measure(session: Any, reference: Any, inputs: Inputs, *, threads: int) -> Measurement:
    """Return how a tower agrees with the float32 one on all inputs, and the latency of both, timed in turn."""
    parity = agreement(embed(reference, inputs), embed(session, inputs))
    latencies_ms = latencies({"fp32": reference, "converted": session}, inputs)
    return measurement(parity, latencies_ms["converted"], reference_ms=latencies_ms["fp32"], threads=threads)


# Relative; a few times the rounding of float32, 6e-8, as sums gather it.
_NOISE = 1e-6
_ROUNDINGS = 4


class NodeByNode(BundleEncoder):
    """Runs the ONNX files without fusing nodes: Q/DQ layers are computed in float32, as the file says.

    INT8 kernels differ by processor, and may be wrong on this one; the reference must not depend on it.
    """

    runtime = "onnxruntime"

    def int8_fault(self, tower: Tower) -> str:
        """Return an empty string: what `open_tower` opens is right everywhere."""
        return ""

    def open_tower(self, tower: Tower) -> Any:
        path = self.folder / tower.file
        if super().int8_fault(tower):
            return self._open_as_written(path.read_bytes())
        return open_session(str(path), threads=self.threads, optimize=False)

    def _open_as_written(self, content: bytes) -> Any:
        from clip_rd_edge.exporting.int8.saturation import open_as_written  # which float32 does not need

        return open_as_written(content, threads=self.threads)


class _RoundedOtherwise(NodeByNode):
    """Runs the ONNX files node by node with weights and scales that differ by rounding, in another way for each seed.

    Processors and runtimes round sums differently, which moves a few INT8 activations to the next level. How far that
    moves the answers depends on the tower: the more layers follow, the farther. This shows it on any processor.
    """

    def __init__(self, encoder: BundleEncoder, seed: int) -> None:
        super().__init__(encoder.folder, encoder.manifest, encoder.options)
        self._rng = np.random.default_rng(seed)

    def open_tower(self, tower: Tower) -> Any:
        model = onnx.load(self.folder / tower.file)
        scales = {node.input[1] for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
        for tensor in model.graph.initializer:
            # Other constants of one number may be settings of an operator.
            if tensor.data_type == onnx.TensorProto.FLOAT and (tensor.name in scales or math.prod(tensor.dims) > 1):
                values = numpy_helper.to_array(tensor)
                factors = 1 + _NOISE * self._rng.standard_normal(values.shape)
                tensor.CopyFrom(numpy_helper.from_array((values * factors).astype(np.float32), tensor.name))
        return self._open_as_written(model.SerializeToString())


def add_reference(folder: Path, encoder: BundleEncoder) -> None:
    """Write reference.npz into a bundle's folder, whose manifest is not written yet.

    Args:
        encoder: computes the answers, such as NodeByNode. Without a text tower, there are none for texts.
    """
    manifest = encoder.manifest
    images = reference_images(manifest.preprocessing.size)
    texts = HARD_TEXTS if manifest.text else ()
    ids = encoder.tokenize(texts) if texts else np.zeros((0, manifest.tokenizer.context_length), dtype=np.int64)

    def embed_images(encoder: BundleEncoder) -> Embeddings:
        return encoder.encode_images([Image.fromarray(image) for image in images])

    def embed_texts(encoder: BundleEncoder) -> Embeddings:
        return encoder.encode_ids(ids) if texts else encoder.encode_texts([])

    def rounding(tower: Tower | None, embed: Callable[[BundleEncoder], Embeddings], answers: Embeddings) -> float:
        """Return the lowest agreement of a tower's answers with those of other roundings; 1 if it is not in INT8."""
        if tower is None or not tower.precision.startswith("int8") or not isinstance(encoder, NodeByNode):
            return 1.0
        return min(worst_agreement(answers, embed(_RoundedOtherwise(encoder, seed))) for seed in range(_ROUNDINGS))

    text_embeddings, image_embeddings = embed_texts(encoder), embed_images(encoder)
    reference = Reference(
        texts=texts,
        ids=ids,
        images=images,
        text_embeddings=text_embeddings,
        image_embeddings=image_embeddings,
        text_rounding=rounding(manifest.text, embed_texts, text_embeddings),
        image_rounding=rounding(manifest.image, embed_images, image_embeddings),
    )
    write_reference(folder, reference)
