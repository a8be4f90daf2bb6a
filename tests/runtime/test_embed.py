from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clip_rd_edge.bundle.image_files import find_images, list_images
from clip_rd_edge.bundle.images import open_image
from clip_rd_edge.errors import InputError
from clip_rd_edge.runtime.load import embed_images, load


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_embeddings_keep_the_input_order_and_unreadable_images_are_reported(
    colour_bundle: Path, colour_images: Path, batch_size: int
) -> None:
    (colour_images / "broken.png").write_bytes(b"not an image")
    paths = [*list_images(colour_images)] * 3
    encoder = load(colour_bundle)
    batches = list(embed_images(encoder, paths, batch_size=batch_size))
    read = [path for batch in batches for path in batch.images]
    assert read == [path for path in paths if path.name != "broken.png"]
    expected = encoder.encode_images([open_image(path) for path in read])
    np.testing.assert_allclose(np.concatenate([batch.embeddings for batch in batches]), expected, atol=1e-6)
    reasons = [str(error) for batch in batches for error in batch.unreadable]
    assert len(reasons) == 3
    assert all("broken.png" in reason for reason in reasons)


def test_a_generator_is_read_only_as_far_as_needed(colour_bundle: Path, colour_images: Path) -> None:
    requested = 0

    def endless() -> object:
        nonlocal requested
        while True:
            requested += 1
            yield colour_images / "red.png"

    batches = embed_images(load(colour_bundle), endless(), batch_size=4)  # type: ignore[arg-type]
    assert len(next(batches).images) == 4
    assert requested == 12
    batches.close()
    assert requested == 12


def test_images_are_found_by_file_folder_glob_and_list(colour_images: Path) -> None:
    (colour_images / "notes.txt").write_text("not an image")
    (colour_images / ".thumbnails").mkdir()
    (colour_images / ".thumbnails" / "red.png").write_bytes(b"")

    def find(*names: object, lines: tuple[str, ...] = ()) -> list[str]:
        paths = find_images(map(str, names), lines=lines)
        return [path.relative_to(colour_images).as_posix() for path in paths]

    assert find(colour_images) == ["blue.jpg", "green.png", "more/yellow.webp", "red.png"]
    assert find(colour_images / "*.png") == ["green.png", "red.png"]
    assert find(colour_images / "**" / "*.webp") == ["more/yellow.webp"]
    assert find("-", lines=(f"{colour_images}/red.png", " ")) == ["red.png"]
    assert find(colour_images / "red.png", colour_images / "more") == ["red.png", "more/yellow.webp"]


def test_a_subfolder_that_cannot_be_read_is_named_and_the_others_are_searched(without_more: Path) -> None:
    errors = list[InputError]()
    paths = list(find_images([str(without_more)], on_unreadable=errors.append))
    assert [path.name for path in paths] == ["blue.jpg", "green.png", "red.png"]
    assert [str(error) for error in errors] == [f"Cannot read the folder {without_more / 'more'}: Permission denied."]
    with pytest.raises(InputError):
        list_images(without_more)
