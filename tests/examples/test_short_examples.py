"""The examples of one file each do what their first lines say."""

from __future__ import annotations

import runpy
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import save_tiny_teacher

import clip_rd_edge as edge

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY: dict[str, Any] = {
    "steps": 2, "batch_size": 8, "image_size": 32, "text": "64x1", "context_length": 8, "precision": "fp32",
    "workers": 0,
}  # fmt: skip


def run(name: str, *arguments: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run an example as a reader does."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_class_folders_become_a_bundle_that_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 40, 40, 3), np.uint8)  # no two are copies
    for i, pixels in enumerate(noise):
        path = tmp_path / "photos" / ("red", "blue")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    teacher = save_tiny_teacher(tmp_path / "teacher")
    main = runpy.run_path(str(EXAMPLES / "class_folders.py"))["main"]
    bundle = main(
        str(tmp_path / "photos"), str(teacher), str(tmp_path / "out"),
        **{"student": "test_resnet", "pretrained_image": None, **TINY},
    )  # fmt: skip
    assert len(list((tmp_path / "out").rglob("held-out/test/*/*.png"))) == 4
    assert edge.verify(bundle)
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_photographs_are_found_by_text(
    colour_bundle: Path, colour_images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):  # the second call finds its index
        run("search_photos.py", colour_bundle, colour_images, "red", monkeypatch=monkeypatch)
        assert capsys.readouterr().out.splitlines()[0].endswith("red.png")


def test_a_change_before_the_camera_is_printed_once() -> None:
    changes = runpy.run_path(str(EXAMPLES / "camera.py"))["changes"]
    cup, phone = [edge.Prediction("a cup", 0.9)], [edge.Prediction("a phone", 0.8)]
    frames = [cup] * 9 + [phone] * 2 + [cup] * 9 + [[]] * 9
    assert list(changes(frames)) == ["a cup", "nothing of these"]


def test_a_client_asks_the_server(
    colour_bundle: Path, colour_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uvicorn = pytest.importorskip("uvicorn")
    from clip_rd_edge.serving.service import Service, make_app

    edge.index(colour_bundle, colour_images, tmp_path / "index")
    service = Service(edge.load(colour_bundle).encoder, index=tmp_path / "index")
    server = uvicorn.Server(uvicorn.Config(make_app(service), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        main = runpy.run_path(str(EXAMPLES / "http_client.py"))["main"]
        main(f"http://127.0.0.1:{port}", str(colour_images / "blue.jpg"), "red", "blue")
    finally:
        server.should_exit = True
        thread.join()
    first, _, hit, *_ = capsys.readouterr().out.splitlines()
    assert first.endswith("blue")
    assert hit.endswith("blue.jpg")


def test_an_architecture_of_ones_own_is_trained(
    pairs_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill = edge.distill
    monkeypatch.setattr(edge, "distill", lambda **options: distill(**{**options, "epochs": None, **TINY}))
    teacher = save_tiny_teacher(tmp_path / "teacher")
    run("custom_student.py", pairs_csv, teacher, tmp_path / "run", monkeypatch=monkeypatch)
    assert edge.load(tmp_path / "run").encode_images([pairs_csv.parent / "pictures" / "0.png"]).shape[0] == 1
