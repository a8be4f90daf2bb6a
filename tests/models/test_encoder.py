from __future__ import annotations

import numpy as np
import torch
from support import tiny_clip

from clip_rd_edge.models.encoder import TorchEncoder, torch_threads


def test_an_evaluation_leaves_every_module_in_its_own_mode() -> None:
    """A frozen text tower stays in evaluation mode while the rest trains; its dropout must not come back."""
    clip = tiny_clip()
    text = clip.model.get_submodule("text")
    text.get_submodule("transformer").register_forward_hook(lambda _, __, output: dropout(output))
    dropout = torch.nn.Dropout(0.5)
    text.add_module("dropout", dropout)
    clip.model.train()
    text.eval()
    modes = {name: module.training for name, module in clip.model.named_modules()}
    encoder = TorchEncoder(clip)
    encoder.encode_pixels(np.zeros((2, 3, 32, 32), dtype=np.float32))
    embeddings = [encoder.encode_texts(["a cat"])]
    assert {name: module.training for name, module in clip.model.named_modules()} == modes
    with torch.no_grad():
        embeddings += [torch.nn.functional.normalize(text(clip.tokenizer(["a cat"])), dim=-1).numpy() for _ in range(2)]
    np.testing.assert_allclose(embeddings[1:], [embeddings[0]] * 2, atol=1e-6)


def test_blocks_in_each_other_restore_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    with torch_threads(before + 2):
        with torch_threads(before + 1), torch_threads(None):
            assert torch.get_num_threads() == before + 1
        assert torch.get_num_threads() == before + 2
    assert torch.get_num_threads() == before
