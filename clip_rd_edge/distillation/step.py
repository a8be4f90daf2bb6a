"""One training step, from a batch to gradients: the same on one process or many, at once or in chunks.

Embeddings come first: those of the whole batch are computed, gathered from all processes, and the loss and its
gradient at the embeddings are taken of the global batch. Only then does the gradient go back through the towers, a
chunk at a time where memory asks for it (GradCache, Gao et al. 2021), with each chunk's embeddings computed again. So
the loss always is that of the global batch, and what remains for the processes is to add up their weights' gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from clip_rd_edge.distillation.config import Precision
from clip_rd_edge.distillation.distributed import Processes
from clip_rd_edge.distillation.loader import Batch
from clip_rd_edge.distillation.teacher import FrozenTextTower, Teacher, TeacherOfBatches
from clip_rd_edge.losses.objective import EmbeddingBatch, LossTerms, Objective
from clip_rd_edge.models.clip import ClipModel, ImageTower, TextTower
from clip_rd_edge.utils.timing import time_in_turn


@dataclass(frozen=True)
class StepResult:
    """What a step computed: the terms of the global batch, without graph, and the embeddings that were compared."""

    loss: LossTerms
    embeddings: EmbeddingBatch


@dataclass(frozen=True)
class StepSettings:
    """How a step is computed; none of it changes the result beyond rounding.

    Attributes:
        autocast: what the towers run in; None for float32. The objective is float32 always.
        chunks: parts that a process's batch goes through the towers in. Batch norms see a chunk at a time.
        block: pairs that the objective looks at together; 0 for all of a process's own.
        global_logits: every process looks at all pairs, and not at its own alone.
        compile: run the student's towers through torch.compile.
        freeze_text: the student's text tower learns its projection alone.
        seed: of what a step draws, such as dropout, together with step, process and chunk.
    """

    autocast: torch.dtype | None = None
    chunks: int = 1
    block: int = 0
    global_logits: bool = False
    freeze_text: bool = False
    compile: bool = False
    seed: int = 0


class TrainingStep:
    """Computes a batch's loss and leaves its gradients in the student's and the objective's parameters.

    Args:
        teacher: None where the objective needs none.
        image_tower: another way of computing the student's image embeddings by its parameters, such as with INT8's
            rounding; None for the plain one.
    """

    def __init__(
        self,
        student: ClipModel,
        teacher: TeacherOfBatches | None,
        objective: Objective,
        processes: Processes,
        settings: StepSettings,
        *,
        image_tower: nn.Module | None = None,
    ) -> None:
        self.student, self.teacher, self.objective = student, teacher, objective
        self.processes, self.settings = processes, settings
        self._image_tower: nn.Module = image_tower or ImageTower(student.model)
        self._text_tower: nn.Module = TextTower(student.model)
        if settings.compile:
            self._image_tower.compile()
            self._text_tower.compile()
        self._frozen_text: FrozenTextTower | None = None
        if settings.freeze_text:
            self._frozen_text = FrozenTextTower(student, processes.device, autocast=settings.autocast)

    def __call__(self, batch: Batch, step: int, *, loss_scale: float = 1.0) -> StepResult:
        """One step.

        Args:
            batch: this process's part of the global batch.
            step: counted from 0.
            loss_scale: what every gradient is multiplied with, for float16.
        """
        model, processes = self.student.model, self.processes
        processes.share_first(model.buffers())
        chunks = list(self._chunks(batch))
        if len(chunks) == 1:
            image, text = self._embed(chunks[0], step, 0)
        else:
            image, text = self._embed_without_graph(chunks, step)
        embeddings = self._gather(batch, image, text)
        loss = self._backward_to_embeddings(embeddings, loss_scale)
        leaves = (embeddings.student_image, embeddings.student_text)
        processes.add_up([leaf.grad for leaf in leaves])
        gradients = [processes.own(_gradient(leaf)) for leaf in leaves]
        if len(chunks) == 1:
            _backward((image, text), gradients)
        else:
            sizes = [len(chunk.captions) for chunk in chunks]
            parts = zip(*(torch.split(gradient, sizes) for gradient in gradients), strict=True)
            for number, (chunk, part) in enumerate(zip(chunks, parts, strict=True)):
                _backward(self._embed(chunk, step, number), list(part))
        processes.add_up([parameter.grad for parameter in (*model.parameters(), *self.objective.parameters())])
        return StepResult(loss, embeddings)

    def _chunks(self, batch: Batch) -> Iterator[Batch]:
        size = -(-len(batch.captions) // self.settings.chunks)
        for start in range(0, len(batch.captions), size):
            part = slice(start, start + size)
            yield Batch(batch.student_pixels[part], None, batch.captions[part])

    def _embed(self, batch: Batch, step: int, chunk: int) -> tuple[Tensor, Tensor]:
        device, autocast = self.processes.device, self.settings.autocast
        # What is drawn is a function of where the run stands: a second pass, or a resumed run, draws the same.
        place = np.random.SeedSequence((self.settings.seed, step, self.processes.rank, chunk))
        torch.manual_seed(int(place.generate_state(1, np.uint64)[0]))
        pixels = batch.student_pixels.to(device, memory_format=torch.channels_last, non_blocking=True)
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            image = self._image_tower(pixels)
            if self._frozen_text is not None:
                return image, self._frozen_text(batch.captions)
            return image, self._text_tower(self.student.tokenizer(batch.captions).to(device))

    @torch.no_grad()
    def _embed_without_graph(self, chunks: list[Batch], step: int) -> tuple[Tensor, Tensor]:
        # The pass with a graph comes second: what batch norms take down in the first would count twice.
        before = [buffer.clone() for buffer in self.student.model.buffers()]
        images, texts = zip(*(self._embed(chunk, step, i) for i, chunk in enumerate(chunks)), strict=True)
        for buffer, old in zip(self.student.model.buffers(), before, strict=True):
            buffer.copy_(old)
        return torch.cat(images), torch.cat(texts)

    def _gather(self, batch: Batch, image: Tensor, text: Tensor) -> EmbeddingBatch:
        gather = self.processes.gather
        student = [gather(rows.detach().float()).requires_grad_() for rows in (image, text)]
        if self.teacher is None:
            return EmbeddingBatch(*student)
        return EmbeddingBatch(*student, *(gather(rows.float()) for rows in self.teacher.embed(batch)))

    def _backward_to_embeddings(self, embeddings: EmbeddingBatch, loss_scale: float) -> LossTerms:
        """Gradients of this process's share of the loss at the global embeddings; returns the global loss."""
        processes, settings = self.processes, self.settings
        pairs = len(embeddings.student_image)
        own = pairs // processes.count
        start, stop = (0, pairs) if settings.global_logits else (processes.rank * own, (processes.rank + 1) * own)
        size = settings.block or stop - start
        share = 1 / processes.count if settings.global_logits else 1.0
        total, terms = torch.zeros((), device=processes.device), dict[str, Tensor]()
        for first in range(start, stop, size):
            block = None if size == pairs else slice(first, min(first + size, stop))
            scale = self.student.model.get_parameter("logit_scale").exp()
            teacher_scale = self.teacher.logit_scale if self.teacher else 0.0
            loss = self.objective(embeddings, scale, teacher_scale, block=block)
            torch.autograd.backward([loss_scale * share * loss.total])
            total += share * loss.total.detach()
            for name, term in loss.terms.items():
                terms[name] = terms.get(name, 0.0) + share * term.detach()
        processes.add_up([total, *terms.values()])
        return LossTerms(total, terms)


def _backward(outputs: tuple[Tensor, Tensor], gradients: list[Tensor]) -> None:
    """Send gradients back through those of the outputs that have a graph; a tower may be frozen."""
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad]
    torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


@torch.no_grad()
def clamp_scales(student: nn.Module, objective: Objective) -> None:
    """Keep the student's logit scale within [1, 100], as CLIP does, and the objective's scales in their range."""
    scale: Tensor = student.get_parameter("logit_scale")
    scale.clamp_(0.0, 4.605170185988092)  # ln 100
    objective.scales.clamp_()


AUTOCAST: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
Measured = Literal["fp32", "bf16"]


def choose_teacher_precision(
    asked: Precision, teacher_in: Callable[[torch.dtype | None], Teacher], batch: Batch, *, rounds: int = 3
) -> tuple[Precision, str]:
    """The precision for the teacher's pictures, and a sentence that says why."""
    if asked != "auto":
        return asked, f"{asked}, as asked"
    if torch.cuda.is_available():
        return "bf16", "bf16, on a CUDA device"
    pixels = batch.teacher_pixels
    if pixels is None:
        raise ValueError("The batch was loaded without pictures for the teacher.")
    teachers = {name: teacher_in(AUTOCAST[name]) for name in get_args(Measured)}
    calls = {name: partial(teacher.embed_images, pixels) for name, teacher in teachers.items()}
    return _faster(calls, "its part of a step", rounds)


def choose_precision(
    asked: Precision, step_in: Callable[[torch.dtype | None], TrainingStep], batch: Batch, *, rounds: int = 3
) -> tuple[Precision, str]:
    """The precision to train in, and a sentence that says why.

    Args:
        step_in: makes a step over the very student and objective in a precision; their weights and buffers are as
            before afterwards, and they have no gradients.
    """
    if asked != "auto":
        return asked, f"{asked}, as asked"
    if torch.cuda.is_available():
        return "bf16", "bf16, on a CUDA device"
    steps = {name: step_in(AUTOCAST[name]) for name in get_args(Measured)}
    model, objective = steps["fp32"].student.model, steps["fp32"].objective
    before = copy.deepcopy(model.state_dict())  # batch norms count what they see
    answer = _faster({name: partial(step, batch, 0) for name, step in steps.items()}, "a step", rounds)
    model.load_state_dict(before)
    model.zero_grad(set_to_none=True)
    objective.zero_grad(set_to_none=True)
    return answer


def _faster(calls: Mapping[str, Callable[[], object]], what: str, rounds: int) -> tuple[Precision, str]:
    times = time_in_turn(calls, rounds=rounds, warmup=1)
    fp32, bf16 = (float(times[name].min()) for name in ("fp32", "bf16"))
    # bfloat16 costs accuracy in the last digits: it has to pay for that.
    chosen: Precision = "bf16" if bf16 < 0.95 * fp32 else "fp32"
    return chosen, f"{chosen}, measured: {what} takes {fp32:.0f} ms in fp32 and {bf16:.0f} ms in bf16"
