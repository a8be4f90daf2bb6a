"""The page's main script, in Node: which of several answers is shown."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from clip_rd_edge.serving.demo import PAGE

from .conftest import Node

# In place of the scripts that app.js imports: images are shown by `show`, and `waiting` has the requests.
MODULES = {
    "api.js": """
        const choice = { folder: "a", name: "a", precision: "fp32", size_bytes: 1, bank: 0, texts: true };
        export const loadChoices = async () => ({ choices: [choice], labels: [], privacy: "" });
        export const classify = (choice, labels, image) =>
            new Promise((resolve, reject) => waiting.push({ image, resolve, reject }));
        export const teaches = false, taughtUrl = null;
    """,
    "images.js": """
        export class ImageSource {
            stream = null;
            constructor(show, showUnreadable) { Object.assign(globalThis, { show, showUnreadable }); }
        }
    """,
    "labels.js": """
        export const percent = (value) => `${100 * value} %`;
        export class LabelList {
            current = ["red"];
            add() {}
            useBank() {}
            clear() {}
            show() {}
            showTaught() {}
        }
    """,
    "memory.js": "export const store = () => {}, restore = () => null;",
}
START = """async () => {
    class Element {
        children = [];
        dataset = {};
        textContent = "";
        classList = { toggle() {} };
        addEventListener() {}
        remove() {}
        setAttribute() {}
        append(...nodes) { this.children.push(...nodes); }
        insertCell() { return this.children[this.children.push(new Element()) - 1]; }
        replaceChildren(...nodes) {
            this.children = nodes;
            this.textContent = nodes.map((node) => node.textContent ?? node).join("");
        }
    }
    const elements = {};
    const getElementById = (id) => (elements[id] ??= new Element());
    globalThis.document = { getElementById, createElement: () => new Element() };
    globalThis.addEventListener = () => {};
    globalThis.waiting = [];
    await import("./app.js");
}"""
# Images and answers in turn; returns what the headline and the line of errors have after each.
PLAY = """async (steps) => {
    const shown = [];
    for (const [what, name] of steps) {
        const { resolve, reject } = waiting.find(({ image }) => image === name) ?? {};
        if (what === "image") show(name, 0);
        if (what === "unreadable") showUnreadable(name);
        if (what === "answer") resolve({ labels: [name], probabilities: [0.9], model_ms: 1, elapsed_ms: 2 });
        if (what === "error") reject(new Error(name));
        await new Promise((resolve) => setTimeout(resolve, 5));
        shown.push([document.getElementById("lead").textContent, document.getElementById("error").textContent]);
    }
    return shown;
}"""


@pytest.fixture
def node(tmp_path: Path, start_node: Callable[[Path], Node]) -> Node:
    shutil.copyfile(PAGE / "app.js", tmp_path / "app.js")
    for name, script in MODULES.items():
        (tmp_path / name).write_text(script)
    node = start_node(tmp_path)
    node.evaluate(START)
    return node


@pytest.mark.parametrize("late", ["answer", "error"])
def test_a_late_answer_does_not_replace_the_newest_images(node: Node, late: str) -> None:
    steps = [("image", "old"), ("image", "new"), ("answer", "new"), (late, "old")]
    assert node.evaluate(PLAY, steps)[-2:] == [["new 90 %", ""]] * 2


@pytest.mark.parametrize("late", ["answer", "error"])
def test_a_late_answer_belongs_to_nothing_beside_an_image_that_cannot_be_read(node: Node, late: str) -> None:
    steps = [("image", "old"), ("unreadable", "no image"), (late, "old")]
    assert node.evaluate(PLAY, steps)[-2:] == [["No result.", "no image"]] * 2


def test_an_answer_and_an_error_are_shown(node: Node) -> None:
    shown = node.evaluate(PLAY, [("image", "a"), ("answer", "a"), ("image", "b"), ("error", "b")])
    assert [shown[1], shown[3]] == [["a 90 %", ""], ["No result.", "b"]]


# Images are 3 × 4 pixels, and this browser turns none; the answer is the width of what `uprightBitmap` returns.
UPRIGHT = """async (bytes) => {
    globalThis.createImageBitmap = async () => ({ width: 3, height: 4, close() {} });
    globalThis.OffscreenCanvas = class {
        constructor(width, height) { Object.assign(this, { width, height }); }
        getContext() { return { setTransform() {}, drawImage() {} }; }
        transferToImageBitmap() { return this; }
    };
    const { uprightBitmap } = await import("./upright.js");
    return (await uprightBitmap(new Blob([Uint8Array.from(bytes)]))).width;
}"""


@pytest.mark.parametrize("length", [4, 5])  # of the chunk before EXIF: an odd one is followed by a byte of padding
def test_a_webp_is_upright_whatever_stands_before_its_exif(
    tmp_path: Path, start_node: Callable[[Path], Node], length: int
) -> None:
    exif = b"MM" + struct.pack(">HIHHHIHHI", 42, 8, 1, 0x0112, 3, 1, 6, 0, 0)
    chunks = struct.pack("<4sI", b"VP8L", length) + bytes(length + length % 2)
    chunks += struct.pack("<4sI", b"EXIF", len(exif)) + exif
    shutil.copyfile(PAGE / "upright.js", tmp_path / "upright.js")
    content = struct.pack("<4sI4s", b"RIFF", 4 + len(chunks), b"WEBP") + chunks
    assert start_node(tmp_path).evaluate(UPRIGHT, list(content)) == 4
