"""A host program sets torch's default dtype and device for its own models; ours are the same as without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import share_in_threads, tiny_clip
from torch import Tensor, nn

from clip_rd_edge.models.clip import float32_on_cpu
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import load_clip, save_clip


@contextmanager
def dtype_of_host(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


HOSTS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "float64": lambda: dtype_of_host(torch.float64),
    "meta": lambda: torch.device("meta"),
}
host = pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    pairs = [(tensor, other[name]) for name, tensor in state.items()]
    return len(state) == len(other) and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@host
def test_a_model_is_loaded_and_encodes_as_without(
    host: Callable[[], AbstractContextManager[object]], tmp_path: Path
) -> None:
    clip = tiny_clip(text="64x2")
    save_clip(tmp_path / "tiny", clip, provenance={})
    images, texts = [Image.new("RGB", (40, 40), "red")], ["a cat", "a", "a dog that sits on a very long sofa"]
    expected = TorchEncoder(clip)
    with host():
        loaded = load_clip(str(tmp_path / "tiny"))
        encoder = TorchEncoder(loaded)
        embeddings = encoder.encode_images(images), encoder.encode_texts(texts)
    assert same(clip.model.state_dict(), loaded.model.state_dict())
    assert np.array_equal(embeddings[0], expected.encode_images(images))
    assert np.array_equal(embeddings[1], expected.encode_texts(texts))


def test_what_the_host_has_set_is_back_when_the_last_thread_has_left() -> None:
    with dtype_of_host(torch.float64):
        inside = share_in_threads(float32_on_cpu, torch.get_default_dtype)
        assert (inside, torch.get_default_dtype()) == (torch.float32, torch.float64)
    with torch.device("meta"):
        with float32_on_cpu():
            assert nn.Linear(1, 1).weight.device.type == "cpu"
        assert torch.zeros(1).device.type == "meta"
