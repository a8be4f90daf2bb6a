"""What a step asks of the teacher, and in batches of which size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clip_rd_edge.distillation.loader import Batch
from clip_rd_edge.distillation.processes.distributed import Processes
from clip_rd_edge.distillation.step import StepSettings, TrainingStep
from clip_rd_edge.distillation.teacher import CachedTeacher, CaptionCache, Teacher, caption_batch_size
from clip_rd_edge.losses.objective import Objective, Weights
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.student import build_student, student_config

CAPTIONS = ["a cat", "two dogs", "red", "blue", "tea", "a boat"]


def tiny(seed: int, trunk: str = "test_resnet") -> ClipModel:
    torch.manual_seed(seed)
    config = student_config(trunk, embedding_size=8, image_size=32, text="64x1", context_length=8)
    return build_student(config, name=trunk)


def test_accumulate_chunks_the_teacher_as_well() -> None:
    teacher = Teacher(tiny(1), torch.device("cpu"), autocast=None, caption_batch=2)
    images, texts = list[int](), list[int]()
    teacher.clip.model.get_submodule("visual").register_forward_pre_hook(lambda _, args: images.append(len(args[0])))
    teacher.clip.model.get_submodule("text").register_forward_pre_hook(lambda _, args: texts.append(len(args[0])))
    step = TrainingStep(tiny(0), teacher, Objective(Weights(task=1, fd=1)), Processes(), StepSettings(chunks=3))
    pixels = torch.randint(256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    result = step(Batch(pixels, (pixels,), CAPTIONS), 0)
    assert images == texts == [2, 2, 2]
    whole = Teacher(tiny(1), torch.device("cpu"), autocast=None)
    assert result.embeddings.teacher_image is not None
    torch.testing.assert_close(result.embeddings.teacher_image, whole.embed_images(pixels), rtol=1e-5, atol=1e-5)


def test_chunks_of_a_batch_keep_their_cached_embeddings() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(6, 8, generator=generator)) for _ in range(2))
    step = TrainingStep(
        tiny(0),
        CachedTeacher(10.0, torch.device("cpu")),
        Objective(Weights(task=1, fd=1)),
        Processes(),
        StepSettings(chunks=2),
    )
    pixels = torch.randint(256, (6, 3, 32, 32), generator=generator).byte()
    batch = Batch(pixels, (), CAPTIONS, teacher_embeddings=(image.half(), text.half()))
    embeddings = step(batch, 0).embeddings
    assert embeddings.teacher_image is not None
    assert embeddings.teacher_text is not None
    assert torch.equal(embeddings.teacher_image, image.half().float())
    assert torch.equal(embeddings.teacher_text, text.half().float())


def test_captions_are_embedded_in_batches_of_one_size_and_only_once() -> None:
    sizes = list[int]()

    def encode(ids: Tensor) -> Tensor:
        sizes.append(len(ids))
        return ids[:, :3].float()

    cache = CaptionCache(tiny(0).tokenizer, encode, torch.device("cpu"), autocast=None, batch_size=4)
    first = cache([*CAPTIONS, "red"])
    assert sizes == [4, 4]
    assert torch.equal(first, tiny(0).tokenizer([*CAPTIONS, "red"])[:, :3].float())
    assert torch.equal(cache(CAPTIONS), first[:6])
    assert sizes == [4, 4]


@pytest.mark.parametrize(("device", "expected"), [("cuda", 512), ("mps", 512), ("cpu", 32)])
def test_captions_on_an_accelerator_come_in_batches_as_large_as_the_images(device: str, expected: int) -> None:
    assert caption_batch_size(512, torch.device(device)) == expected
