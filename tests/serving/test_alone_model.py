"""The browser page's answers are those of the runtime, from the page's requests to the model's worker, in Node.

In place of onnxruntime-web and of the tokenizers' library are scripts that compute what the bundle's towers compute.
"""

from __future__ import annotations

import base64
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import rewrite

import clip_rd_edge as edge
from clip_rd_edge.bundle.encoder import Scoring
from clip_rd_edge.bundle.labels import LabelBank, write_labels
from clip_rd_edge.bundle.manifest import BACKGROUND, read_manifest, write_manifest
from clip_rd_edge.bundle.preprocess import Preprocessing
from clip_rd_edge.bundle.reference import Reference, reference_images, write_reference
from clip_rd_edge.bundle.tokenizer import TokenizerSpec
from clip_rd_edge.exporting.layouts.browser import ALONE, PAGE
from clip_rd_edge.runtime.classifier import ZeroShotClassifier
from clip_rd_edge.runtime.load import load
from clip_rd_edge.runtime.taught import nothing_taught, taught_among

from .conftest import Node

RUNTIME = """
export const env = { wasm: {} };
export class Tensor {
    constructor(type, data, dims) { Object.assign(this, { type, data, dims }); }
}
const TABLE = [[0, 0, 0], [1e-3, 1e-3, 1e-3], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]];
const add = (values) => values.reduce((sum, value) => sum + value, 0);
const TOWERS = {
    float32: (pixels) => [0, 1, 2].map((i) => add(pixels.slice(i * pixels.length / 3, (i + 1) * pixels.length / 3))),
    int64: (ids) => [0, 1, 2].map((i) => add(ids.map((id) => TABLE[id][i]))),
};
async function run({ x: { type, data, dims } }) {
    (globalThis.batches ??= []).push(dims);
    const values = Array.from(data, Number), size = values.length / dims[0];
    const rows = Array.from({ length: dims[0] }, (_, i) => TOWERS[type](values.slice(i * size, (i + 1) * size)));
    const scaled = rows.map((row) => row.map((value) => value / Math.hypot(...row) * (globalThis.factor ?? 1)));
    return { y: { data: Float32Array.from(scaled.flat()), dims: [dims[0], 3] } };
}
export const InferenceSession = { create: async () => ({ run }) };
"""
TOKENIZERS = """
export class Tokenizer {
    constructor({ model }) { this.words = model.vocab; }
    encode(text) {
        const tokens = text.split(" ").filter(Boolean);
        return { tokens, ids: tokens.map((token) => this.words[token] ?? 1) };
    }
}
"""
OPEN = """async () => {
    const { loadChoices } = await import("./api.js");
    let shown = "";
    return { ...await loadChoices((message) => (shown = message)), shown };
}"""
CLASSIFY = """async ([labels, encoded, width, taught]) => {
    const { classify } = await import("./api.js");
    const bytes = Uint8ClampedArray.from(atob(encoded), (character) => character.charCodeAt(0));
    return classify(0, labels, new ImageData(bytes, width), taught ?? undefined);
}"""
LABELS = ["red", "green", "Blue ", "yellow green", "a red red", "mauve"]
Start = Callable[[], Node]


@pytest.fixture
def bundle(colour_bundle: Path) -> Path:
    """The bundle of colours, with no setting that equals another or leaves anything as it is."""
    rewrite(
        colour_bundle,
        preprocessing=Preprocessing(size=(8, 8), mean=(0.1, 0.2, 0.15), std=(0.3, 0.2, 0.25)),
        tokenizer=TokenizerSpec(context_length=6, pad_id=5),
        templates=("a photo of {c}", "{c} red"),
        logit_scale=7.0,
    )
    return colour_bundle


@pytest.fixture
def start(bundle: Path, tmp_path: Path, start_node: Callable[[Path], Node]) -> Start:
    """Return a function that starts Node with the page's scripts beside the bundle."""

    def run() -> Node:
        folder = tmp_path / "site"
        for source in (PAGE, ALONE):
            shutil.copytree(source, folder, dirs_exist_ok=True)
        shutil.copytree(bundle, folder / "bundle")
        (folder / "npm").mkdir()
        (folder / "npm" / "ort.wasm.js").write_text(RUNTIME)
        (folder / "npm" / "ort-wasm-simd-threaded.wasm").write_bytes(bytes(1_600_000))
        (folder / "npm" / "tokenizers.js").write_text(TOKENIZERS)
        (folder / "sizes.json").write_text('{"loaded": 2000000, "bundle": 1}')
        return start_node(folder)

    return run


def picture(seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (9, 12, 4), dtype=np.uint8)
    levels[..., seed % 3] //= 4  # so that no two channels are alike
    return Image.fromarray(levels)


def classify(
    node: Node, labels: list[str] | None, image: Image.Image, taught: dict[str, list[str]] | None = None
) -> dict[str, Any]:
    pixels = base64.b64encode(image.tobytes()).decode()
    answer: dict[str, Any] = node.evaluate(CLASSIFY, [labels, pixels, image.width, taught])
    return answer


def assert_runtimes(answer: dict[str, Any], bundle: Path, labels: list[str] | None, image: Image.Image) -> None:
    classifier = ZeroShotClassifier(load(bundle, threads=1), labels)
    (expected,) = classifier.classify([image.convert("RGB")], top=len(answer["labels"]))
    assert answer["labels"] == [label for label, _ in expected]
    assert answer["probabilities"] == pytest.approx([probability for _, probability in expected], abs=1e-5)


@pytest.mark.parametrize("bias", [None, -4.5])
def test_answers_are_those_of_the_runtime(bias: float | None, bundle: Path, start: Start) -> None:
    write_manifest(bundle, read_manifest(bundle).with_scoring(Scoring(7.0, bias)))
    node = start()
    opened = node.evaluate(OPEN)
    assert [choice["bank"] for choice in opened["choices"]] == [0]
    assert opened["shown"] == "Loading: 2 of 2 MB."
    for labels in (LABELS, LABELS[2:], LABELS):
        for seed in range(3):
            answer = classify(node, labels, picture(seed))
            assert len(answer["labels"]) == len(labels)
            assert_runtimes(answer, bundle, labels, picture(seed))


def test_a_bundles_own_labels_have_their_own_rows(bundle: Path, start: Start) -> None:
    rows = np.random.default_rng(1).standard_normal((30, 3)).astype(np.float32)
    bank = LabelBank(tuple(f"label {i}" for i in range(30)), rows / np.linalg.norm(rows, axis=1, keepdims=True))
    write_labels(bundle, bank)
    rewrite(bundle)
    node = start()
    assert [choice["bank"] for choice in node.evaluate(OPEN)["choices"]] == [30]
    answer = classify(node, None, picture())
    assert len(answer["labels"]) == 20  # as many as the demo's server returns
    assert_runtimes(answer, bundle, None, picture())
    assert_runtimes(classify(node, LABELS, picture()), bundle, LABELS, picture())
    assert_runtimes(classify(node, ["label 3", "red"], picture()), bundle, ["label 3", "red"], picture())


def test_a_taught_label_has_its_row_beside_others(bundle: Path, start: Start, tmp_path: Path) -> None:
    images = [np.asarray(picture(seed).convert("RGB")) for seed in range(4)]
    edge.teach(bundle, {"mine": images[:2], "yours": images[2:]}, output=tmp_path / "taught")
    shutil.rmtree(bundle)
    shutil.copytree(tmp_path / "taught", bundle)
    node = start()
    node.evaluate(OPEN)
    for labels in (None, ["mine", "red", "Blue "], ["yours", "mine"], LABELS):
        assert_runtimes(classify(node, labels, picture(1)), bundle, labels, picture(1))


@pytest.mark.parametrize(
    ("bias", "counts", "has_lessons"), [(None, (3, 2), False), (None, (1, 1), True), (-4.5, (3, 1), True)]
)
def test_images_teach_labels_in_the_browser_as_in_the_runtime(
    bias: float | None, counts: tuple[int, int], has_lessons: bool, bundle: Path, start: Start, tmp_path: Path
) -> None:
    nouns = np.abs(np.random.default_rng(2).standard_normal((40, 3))).astype(np.float32)
    nouns /= np.linalg.norm(nouns, axis=1, keepdims=True)
    write_labels(bundle, LabelBank(tuple(map(str, range(40))), nouns), name=BACKGROUND)
    write_manifest(bundle, read_manifest(bundle).with_scoring(Scoring(7.0, bias)))
    images = reference_images((8, 8))
    rows, texts = load(bundle).encode_images(list(images)), np.zeros((0, 3), np.float32)
    write_reference(bundle, Reference((), np.zeros((0, 6), np.int64), images, texts, rows))
    rewrite(bundle)
    if has_lessons:
        edge.teach(bundle, {"mine": [np.asarray(picture(9).convert("RGB"))]}, output=tmp_path / "before")
        shutil.rmtree(bundle)
        shutil.copytree(tmp_path / "before", bundle)
    node, labels = start(), ["mine", "red", "yours", "Blue "]
    node.evaluate(OPEN)
    lessons = {"mine": range(counts[0]), "yours": range(10, 10 + counts[1])}
    taught = {
        label: [classify(node, labels, picture(seed))["embedding"] for seed in seeds]
        for label, seeds in lessons.items()
    }
    encoder = load(bundle, threads=1)
    examples = {
        label: encoder.encode_images([picture(seed).convert("RGB") for seed in seeds])
        for label, seeds in lessons.items()
    }
    encoder.label_bank = taught_among(encoder, encoder.taught or nothing_taught(encoder), labels, examples)[1]
    classifier, answered = ZeroShotClassifier(encoder, None, none=True), set()
    asked = [picture(seed) for seed in range(20, 30)]
    asked += [Image.new("RGBA", (9, 9), colour) for colour in ("red", "lime", "blue", "cyan", "magenta", "grey")]
    for image in asked:
        answer = classify(node, labels, image, taught)
        (expected,) = classifier.classify([image.convert("RGB")], top=4)
        probabilities = dict(zip(answer["labels"], answer["probabilities"], strict=True))
        assert probabilities == pytest.approx(dict(expected), abs=2e-3)
        answered.add(bool(expected))
    assert answered == {True, False} or counts == (1, 1)
    with pytest.raises(RuntimeError, match="anew"):
        classify(node, labels, picture(), {"mine": ["00000000:AAAA"]})


@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_texts_are_embedded_in_batches_and_once(bundle: Path, start: Start, one_at_a_time: bool) -> None:
    rewrite(bundle, text={"one_at_a_time": one_at_a_time})
    node = start()
    node.evaluate(OPEN)
    labels = [f"red {'green ' * i}" for i in range(20)]
    for _ in range(2):
        assert_runtimes(classify(node, labels, picture()), bundle, labels, picture())
    classify(node, [*labels, "blue"], picture())
    texts, image = [[1, 6]] * 40 if one_at_a_time else [[32, 6], [8, 6]], [1, 3, 8, 8]
    new = [[1, 6]] * 2 if one_at_a_time else [[2, 6]]
    assert node.evaluate("() => batches") == [*texts, image, image, *new, image]


@pytest.mark.parametrize("name", ["image.onnx", "text.onnx", "tokenizer.json", "labels.npz"])
def test_a_file_of_another_export_is_an_error_and_no_answer(bundle: Path, start: Start, name: str) -> None:
    if name == "labels.npz":
        write_labels(bundle, LabelBank(("red", "blue"), np.eye(3, dtype=np.float32)[:2]))
        rewrite(bundle)
    manifest = (bundle / "manifest.json").read_bytes()
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (bundle / "manifest.json").write_bytes(manifest)
    node = start()
    with pytest.raises(RuntimeError, match=f"^{name} is not of this export"):
        node.evaluate(OPEN)


def test_numbers_that_are_not_finite_are_an_error_and_no_answer(start: Start) -> None:
    node = start()
    node.evaluate(OPEN)
    node.evaluate("() => { globalThis.factor = NaN; }")
    for _ in range(2):  # labels that failed are sent again
        with pytest.raises(RuntimeError, match=r"^text\.onnx computes numbers that are not finite"):
            classify(node, LABELS, picture())
    node.evaluate("() => { globalThis.factor = 1; }")
    classify(node, LABELS, picture())
    node.evaluate("() => { globalThis.factor = Infinity; }")
    with pytest.raises(RuntimeError, match=r"^image\.onnx computes numbers that are not finite"):
        classify(node, LABELS, picture())
