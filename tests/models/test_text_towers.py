"""Texts are computed without the positions that do not matter, and come out the same."""

from __future__ import annotations

import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from clip_rd_edge.models.clip import TextTower
from clip_rd_edge.models.encoder import CaptionTower

# Of 3 to 77 tokens; the first id of CLIP's vocabulary is that of "!" and pads as well.
TEXTS = ["", "red", "a cat!!", "!", "two dogs in the snow and one cat in a tree", "tea " * 40, "long " * 200, "red"]


def custom(kind: Any = open_clip.CustomTextCLIP, **text_cfg: Any) -> nn.Module:
    torch.manual_seed(0)
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2, **text_cfg}
    vision = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}
    model: nn.Module = kind(embed_dim=16, vision_cfg=vision, text_cfg=text)
    return model.eval()


def plain() -> nn.Module:
    """open_clip's `CLIP`, which has the text tower's parts at the top."""
    return custom(open_clip.CLIP)


def positions(tower: CaptionTower, ids: Tensor) -> list[tuple[int, ...]]:
    """Compute the ids, and return the shapes of what passes through the tower."""
    shapes = list[tuple[int, ...]]()
    embedding = next(m for m in tower.modules() if isinstance(m, nn.Embedding) and m.num_embeddings > 1000)
    with embedding.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape))):
        tower(ids)
    return shapes


@pytest.mark.parametrize("make", [custom, plain, lambda: custom(pool_type="eos", eos_id=49407)])
def test_clips_texts_come_out_the_same_without_what_follows_their_ends(make: Any) -> None:
    model = make()
    whole, tower = TextTower(model), CaptionTower(TextTower(model), model)
    ids = open_clip.get_tokenizer("ViT-B-32")(TEXTS)
    assert tower.lengths(ids) == [8, 8, 8, 8, 16, 64, 77, 8]
    assert positions(tower, ids) == [(6, 13), (2, 77)]
    torch.testing.assert_close(tower(ids), whole(ids))
    assert torch.equal(tower.compute(ids[:1], 77), whole(ids[:1]))


def test_a_text_of_any_length_has_room_for_its_end() -> None:
    model = custom()
    tower = CaptionTower(TextTower(model), model)
    ids = open_clip.get_tokenizer("ViT-B-32")(["tea " * count for count in range(80)])
    ends = [min(count + 2, 77) for count in range(80)]
    assert (ids.argmax(1) + 1).tolist() == ends
    assert tower.lengths(ids) == [next(length for length in (8, 16, 32, 64, 77) if end <= length) for end in ends]
    torch.testing.assert_close(tower(ids), TextTower(model)(ids))


def test_threads_that_share_a_tower_see_the_positions_of_their_own_texts() -> None:
    model = custom()
    tower = CaptionTower(TextTower(model), model)
    ids = open_clip.get_tokenizer("ViT-B-32")(TEXTS)
    expected, names = tower(ids), list(model.state_dict())
    with (
        next(m for m in tower.modules() if isinstance(m, nn.Embedding)).register_forward_hook(
            lambda *_: time.sleep(0.01)  # so that calls overlap
        ),
        ThreadPoolExecutor(4) as pool,
    ):
        rows = list(pool.map(tower, [ids[row : row + 1] for row in (0, 4, 5, 6)]))
    torch.testing.assert_close(torch.cat(rows), expected[[0, 4, 5, 6]])
    assert list(model.state_dict()) == names
    torch.testing.assert_close(tower(ids), expected)


def test_gradients_are_those_of_the_whole_context() -> None:
    model = custom()
    ids = open_clip.get_tokenizer("ViT-B-32")(TEXTS)
    weights = torch.randn(len(ids), 16, generator=torch.Generator().manual_seed(0))
    gradients = []
    for tower in (TextTower(model), CaptionTower(TextTower(model), model)):
        model.zero_grad()
        (tower(ids) * weights).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert gradients[0]["text.positional_embedding"].any()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text_cfg", [{"no_causal_mask": True}, {"pool_type": "last"}, {"embed_cls": True}])
def test_other_towers_of_open_clip_compute_the_whole_context(text_cfg: dict[str, Any]) -> None:
    model = custom(**text_cfg)
    ids = open_clip.get_tokenizer("ViT-B-32")(TEXTS)
    tower = CaptionTower(TextTower(model), model)
    assert positions(tower, ids) == [(len(TEXTS), 77)]
    torch.testing.assert_close(tower(ids), TextTower(model)(ids))


@pytest.mark.parametrize(("pooler", "cut"), [("mean_pooler", True), ("cls_pooler", True), ("max_pooler", False)])
def test_padding_of_hugging_face_is_left_out(pooler: str, cut: bool, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=1100, max_position_embeddings=40, **sizes)).save_pretrained(tmp_path)
    text = {"hf_model_name": str(tmp_path), "hf_pooler_type": pooler, "hf_proj_type": "linear", "context_length": 40}
    model = custom(**text)
    lengths = [3, 40, 9, 8, 20, 3]
    ids = torch.randint(1, 1100, (6, 40), generator=torch.Generator().manual_seed(0))
    ids[torch.arange(40) >= torch.tensor(lengths)[:, None]] = 0
    tower = CaptionTower(TextTower(model), model)
    assert tower.lengths(ids) == ([8, 40, 16, 8, 32, 8] if cut else [40] * 6)
    if cut:  # open_clip's max pooler cannot be run: its mask is not Boolean
        torch.testing.assert_close(tower(ids), TextTower(model)(ids))
    assert pickle.loads(pickle.dumps(tower)).lengths(ids) == tower.lengths(ids)
