"""What a step asks of the teacher, and in batches of which size."""

from __future__ import annotations

import open_clip
import pytest
import torch
from support import tiny_clip
from torch import Tensor, nn

from clip_rd_edge.distillation.loader import Batch
from clip_rd_edge.distillation.processes import Processes
from clip_rd_edge.distillation.step import StepSettings, TrainingStep
from clip_rd_edge.distillation.teacher import CaptionCache, LiveTeacher, Teacher
from clip_rd_edge.losses.objective import Objective, Weights
from clip_rd_edge.models.encoder import LENGTHS, CaptionTower

CAPTIONS = ["a cat", "two dogs", "red", "blue", "tea", "a boat"]


def test_accumulate_chunks_the_teacher_as_well() -> None:
    teacher = Teacher(tiny_clip(seed=1), torch.device("cpu"), autocast=None, caption_batch=2)
    images, texts = list[int](), list[int]()
    teacher.clip.model.get_submodule("visual").register_forward_pre_hook(lambda _, args: images.append(len(args[0])))
    teacher.clip.model.get_submodule("text").register_forward_pre_hook(lambda _, args: texts.append(len(args[0])))
    step = TrainingStep(
        tiny_clip(seed=0), LiveTeacher([teacher]), Objective(Weights(task=1, fd=1)), Processes(), StepSettings(chunks=3)
    )
    pixels = torch.randint(256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    result = step(Batch(pixels, (pixels,), CAPTIONS), 0)
    assert images == texts == [2, 2, 2]
    whole = Teacher(tiny_clip(seed=1), torch.device("cpu"), autocast=None)
    assert result.embeddings.teacher_image is not None
    torch.testing.assert_close(result.embeddings.teacher_image, whole.embed_images(pixels), rtol=1e-5, atol=1e-5)


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
