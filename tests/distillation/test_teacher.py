"""What a step asks of the teacher, in batches of which size; and what texts it chooses for images without captions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec
import open_clip
import pytest
import torch
from support import Watch, tiny_clip
from tiny_runs import run_on_images_and_labels
from torch import Tensor, nn
from torch.nn.functional import normalize

from clip_rd_edge.distillation import teacher as choosing
from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.loader import Batch
from clip_rd_edge.distillation.run import run_distillation
from clip_rd_edge.distillation.setup import training_pairs
from clip_rd_edge.distillation.step import TrainingStep
from clip_rd_edge.distillation.teacher import (
    CaptionCache,
    ChoosingTeacher,
    Targets,
    Teacher,
    texts_to_choose_from,
)
from clip_rd_edge.models import encoder as captions_module
from clip_rd_edge.models.encoder import LENGTHS, CaptionTower

CAPTIONS = ["a cat", "two dogs", "red", "blue", "tea", "a boat"]


class FirstIds(nn.Module):
    """Stands for a text tower of CLIP's: returns the first three ids, and remembers the shapes of all it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = list[tuple[int, ...]]()
        self.weight = nn.Parameter(torch.ones(()))
        self.attn_mask, self.pool_type = torch.zeros(77, 77), "argmax"

    def forward(self, ids: Tensor) -> Tensor:
        self.shapes.append(tuple(ids.shape))
        return ids[:, :3] * self.weight


@pytest.mark.parametrize("cuts", [True, False])
def test_captions_are_embedded_only_once_in_batches_of_one_size_for_each_length(cuts: bool) -> None:
    tower, captions = FirstIds(), [*CAPTIONS, "red", "a long picture of a small house under a green tree", "tea " * 50]
    tokenizer = open_clip.SimpleTokenizer()
    captions_tower = CaptionTower(tower, tower, choices=LENGTHS if cuts else ())
    cache = CaptionCache(tokenizer, captions_tower, torch.device("cpu"), autocast=None, batch_size=4)
    first = cache(captions)
    expected = [(4, 8), (4, 8), (2, 16), (1, 64)] if cuts else [(4, 77), (4, 77)]
    assert tower.shapes == expected
    assert torch.equal(first, tokenizer(captions)[:, :3].float())
    assert torch.equal(cache(CAPTIONS), first[:6])
    assert tower.shapes == expected


def test_a_captions_embedding_does_not_depend_on_what_else_is_in_its_batch() -> None:
    clip = tiny_clip(text="128x2", context_length=77)
    captions = [" ".join(["a", "red", "cat", "on", "two", "boats"] * 9)[:length] for length in range(4, 140, 3)]
    whole = Teacher(clip, torch.device("cpu"), autocast=None).embed_captions(captions)
    teacher = Teacher(clip, torch.device("cpu"), autocast=None)
    for row in reversed(range(len(captions))):
        assert torch.equal(teacher.embed_captions([captions[row]])[0], whole[row])


PROMPTS = [("a red thing", "red"), ("a green thing", "green"), ("blue",)]
# Of "blue", a row alone; the means of the others' prompts point to their axis, while no single prompt does.
EMBEDDINGS = {
    "a red thing": [1, 0, 0, 0.7], "red": [1, 0, 0, -0.7],
    "a green thing": [0, 1, 0, 0.7], "green": [0, 1, 0, -0.7],
    "blue": [0, 0, 1, 0],
}  # fmt: skip
# Violet is nearer to blue, but its product with the sum of red's two prompts is larger than that with blue's one.
IMAGES = {"red": [0.9, 0, 0, 0.1], "green": [0, 0.9, 0.1, 0], "blue": [0, 0, 1, 0], "violet": [0.6, 0, 0.8, 0]}


def embed(prompts: list[str]) -> Tensor:
    return normalize(torch.tensor([EMBEDDINGS[prompt] for prompt in prompts], dtype=torch.float32), dim=-1)


class Colours:
    """A teacher of images that are named in the batch's captions, as `colour: caption`."""

    logit_scale = 10.0

    def embed(self, batch: Batch) -> Targets:
        images = [IMAGES[caption.partition(":")[0]] for caption in batch.captions]
        return Targets(normalize(torch.tensor(images), dim=-1), torch.zeros(len(images), 4), batch.captions)


def batch_of(captions: list[str], paired: tuple[bool, ...] | None) -> Batch:
    """A batch of white pixels, but for those of a caption `…: kept`, which are black."""
    levels = torch.tensor([0 if caption.endswith("kept") else 1 for caption in captions], dtype=torch.uint8)
    return Batch(levels[:, None, None, None].expand(-1, 3, 1, 1), (), captions, paired=paired)


def test_the_text_nearest_to_an_image_takes_the_place_of_its_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions_module, "_BATCH", 2)
    watch = Watch()
    teacher = ChoosingTeacher(Colours(), PROMPTS, embed, reporter=watch)
    captions = ["red: in turn", "blue: its own", "green: in turn", "blue: in turn"]
    paired = (False, True, False, False)
    image, text, chosen = teacher.embed(batch_of(captions, paired))
    assert [chosen[0] in PROMPTS[0], chosen[2] in PROMPTS[1]] == [True, True]
    assert (chosen[1], chosen[3]) == ("blue: its own", "blue")
    assert torch.equal(image, Colours().embed(batch_of(captions, paired)).image)
    assert torch.equal(text[[0, 2, 3]], embed([chosen[row] for row in (0, 2, 3)]))
    assert torch.equal(text[1], torch.zeros(4))
    assert teacher.logit_scale == 10.0


def test_all_prompts_of_a_text_take_turns_and_some_rows_keep_their_texts() -> None:
    teacher = ChoosingTeacher(Colours(), PROMPTS, embed)
    captions = [f"red: {number}" for number in range(20)]
    first = teacher.embed(batch_of(captions, (False,) * 20)).captions
    assert set(first) == set(PROMPTS[0])
    assert teacher.embed(batch_of(captions, (False,) * 20)).captions == first
    _, text, chosen = teacher.embed(batch_of(["red: in turn", "green: kept", "blue: in turn"], (False,) * 3))
    assert chosen[1:] == ["green: kept", "blue"]
    assert not text[1].any()


@pytest.fixture
def config(pairs_csv: Path, tmp_path: Path) -> RunConfig:
    """A run on 24 images and four labels in two prompts each."""
    return run_on_images_and_labels(pairs_csv, tmp_path, templates=("a {} picture", "{}"))


def texts_of(config: RunConfig, **changes: object) -> list[tuple[str, ...]]:
    config = msgspec.structs.replace(config, **changes)
    return texts_to_choose_from(config, training_pairs(config))


def test_what_a_teacher_chooses_from(config: RunConfig, pairs_csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert texts_of(config)[0] == ("a red picture", "red")
    assert len(texts_of(config)) == 4
    own = texts_of(config, data=str(pairs_csv), texts=None, templates=())
    assert own[3] == ("a yellow picture number 3",)
    assert len(own) == 24
    # Images that have captions keep them, and texts alone have no images.
    assert texts_of(config, data=str(pairs_csv), images=None) == []
    assert texts_of(config, images=None) == []
    assert texts_of(config, data=str(pairs_csv), images=None, texts=None, templates=()) == []
    monkeypatch.setattr(choosing, "MAX_TEXTS", 3)
    some = texts_of(config)
    assert len(some) == 3
    assert some == texts_of(config)
    assert some != texts_of(config, seed=1) or some != texts_of(config, seed=2)


def test_a_run_trains_with_the_texts_that_its_teacher_chose_and_with_all_others(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny teacher with random weights finds one and the same text nearest to all images."""
    recipe = msgspec.structs.replace(config.recipe, steps=16)
    config = msgspec.structs.replace(config, recipe=recipe, store=str(tmp_path / "cache"), views=4)
    trained = Counter[str]()
    embed_captions = TrainingStep._embed_captions

    def seen(step: TrainingStep, captions: list[str], ids: Tensor | None) -> Tensor:
        trained.update(caption.removeprefix("a ").removesuffix(" picture") for caption in captions)
        return embed_captions(step, captions, ids)

    monkeypatch.setattr(TrainingStep, "_embed_captions", seen)
    run_distillation(config, tmp_path / "run", resume=False)
    (_, most), *others = trained.most_common()
    assert sum(trained.values()) == 16 * 6
    assert most > 0.6 * 16 * 6
    assert len(others) == 3
