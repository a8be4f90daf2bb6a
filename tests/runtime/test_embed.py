from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_rd_edge.contract.images import find_images, images_below, open_image
from clip_rd_edge.errors import ClipRdEdgeError, InputError
from clip_rd_edge.runtime.embed import embed_images
from clip_rd_edge.runtime.load import load


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_same_embeddings_in_the_same_order_and_the_unreadable_told(
    colour_bundle: Path, colour_pictures: Path, batch_size: int
) -> None:
    (colour_pictures / "broken.png").write_bytes(b"no picture")
    paths = [*images_below(colour_pictures)] * 3
    encoder = load(colour_bundle)
    batches = list(embed_images(encoder, paths, batch_size=batch_size, workers=2))
    read = [path for batch in batches for path in batch.images]
    assert read == [path for path in paths if path.name != "broken.png"]
    expected = encoder.encode_images([open_image(path) for path in read])
    np.testing.assert_allclose(np.concatenate([batch.embeddings for batch in batches]), expected, atol=1e-6)
    reasons = [str(error) for batch in batches for error in batch.unreadable]
    assert len(reasons) == 3
    assert all("broken.png" in reason for reason in reasons)


def test_a_long_list_is_taken_as_it_is_needed(colour_bundle: Path, colour_pictures: Path) -> None:
    taken = 0

    def endless() -> object:
        nonlocal taken
        while True:
            taken += 1
            yield colour_pictures / "red.png"

    batches = embed_images(load(colour_bundle), endless(), batch_size=4)  # type: ignore[arg-type]
    assert len(next(batches).images) == 4
    assert taken == 12
    batches.close()
    assert taken == 12


def test_the_next_batch_is_embedded_while_the_caller_has_one(
    colour_bundle: Path, colour_pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load(colour_bundle)
    encode, second = encoder.encode_pixels, threading.Event()
    seen: list[int] = []

    def watched(pixels: np.ndarray) -> np.ndarray:
        seen.append(len(pixels))
        if len(seen) == 2:
            second.set()
        return encode(pixels)

    monkeypatch.setattr(encoder, "encode_pixels", watched)
    batches = embed_images(encoder, [colour_pictures / "red.png"] * 5, batch_size=2)
    next(batches)
    assert second.wait(timeout=10)
    assert [len(batch.images) for batch in batches] == [2, 1]


def test_large_jpegs_may_be_opened_quickly(colour_bundle: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "photo.jpg"
    Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((320, 240)).save(path)
    encoder = load(colour_bundle)
    (whole,), (quick,) = (list(embed_images(encoder, [path], quick=quick)) for quick in (False, True))
    assert not np.array_equal(whole.embeddings, quick.embeddings)
    np.testing.assert_allclose(whole.embeddings, quick.embeddings, atol=0.02)


def test_what_the_model_fails_on_reaches_the_caller(
    colour_bundle: Path, colour_pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load(colour_bundle)

    def fail(pixels: np.ndarray) -> np.ndarray:
        raise ClipRdEdgeError("the card is gone")

    monkeypatch.setattr(encoder, "encode_pixels", fail)
    with pytest.raises(ClipRdEdgeError, match="the card is gone"):
        list(embed_images(encoder, [colour_pictures / "red.png"] * 9, batch_size=2))


def test_pictures_by_file_folder_glob_and_list(colour_pictures: Path) -> None:
    (colour_pictures / "notes.txt").write_text("no picture")
    (colour_pictures / ".thumbnails").mkdir()
    (colour_pictures / ".thumbnails" / "red.png").write_bytes(b"")

    def found(*names: object, listed: tuple[str, ...] = ()) -> list[str]:
        paths = find_images(map(str, names), listed=listed)
        return [path.relative_to(colour_pictures).as_posix() for path in paths]

    everything = ["blue.jpg", "green.png", "more/yellow.webp", "red.png"]
    assert found(colour_pictures) == everything
    assert found(colour_pictures / "*.png") == ["green.png", "red.png"]
    assert found(colour_pictures / "**" / "*.webp") == ["more/yellow.webp"]
    assert found("-", listed=(f"{colour_pictures}/red.png\n", "\n")) == ["red.png"]
    assert found(colour_pictures / "red.png", colour_pictures / "more") == ["red.png", "more/yellow.webp"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.png", "no picture or folder"), ("*.gif", "No picture matches"), ("empty", "has no pictures")],
)
def test_what_is_not_there(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        list(find_images([str(tmp_path / name)]))
