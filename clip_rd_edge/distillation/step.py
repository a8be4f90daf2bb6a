"""One training step, from a batch to gradients: the same on one or several processes, in one pass or in chunks.

First, the embeddings of the whole batch are computed and gathered from all processes. The loss and its gradient with
respect to the embeddings are those of the global batch. Only then does the gradient flow back through the towers. To
save memory, this can happen in chunks, whose embeddings are recomputed (GradCache, Gao et al. 2021). So the loss is
always that of the global batch, and the processes only have to sum the gradients of their weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.depthwise import speed_up_small_maps, take_strides_first
from clip_rd_edge.distillation.loader import Batch
from clip_rd_edge.distillation.pixels import Normaliser
from clip_rd_edge.distillation.processes import Processes
from clip_rd_edge.distillation.store import QueueBank, TeacherBank
from clip_rd_edge.distillation.teacher import (
    CPU_CAPTION_BATCH,
    BatchTeacher,
    FrozenTextTower,
    Targets,
    caption_batch_size,
)
from clip_rd_edge.losses.objective import MAX_SCALE, LossTerms, Objective
from clip_rd_edge.losses.terms import EmbeddingBatch
from clip_rd_edge.models.clip import ClipModel, ImageTower, TextTower
from clip_rd_edge.models.encoder import LENGTHS, CaptionTower

EmbedTexts = Callable[[list[str], Tensor | None], Tensor]  # captions and, where they are tokenised already, their ids


@dataclass(frozen=True)
class StepResult:
    """Loss terms of the global batch, without graph, and the embeddings they were computed from."""

    loss: LossTerms
    embeddings: EmbeddingBatch


@dataclass(frozen=True)
class StepSettings:
    """How a step is computed. Except for `freeze_text` and `seed`, results differ only by rounding.

    Attributes:
        autocast: dtype that the towers run in; None for float32. The objective always runs in float32.
        chunks: number of chunks in which a process's batch passes through the towers of student and teacher. Batch
            norms see one chunk at a time.
        block: pairs per block of the objective; 0 takes all of a process's pairs at once.
        global_logits: every process computes the loss of all pairs rather than of its own.
        caption_batch: captions per pass through a frozen text tower; see `teacher.caption_batch_size`.
        seed: with step, process and chunk, seeds the random draws of a step, such as dropout.
    """

    autocast: torch.dtype | None = None
    chunks: int = 1
    block: int = 0
    global_logits: bool = False
    freeze_text: bool = False
    caption_batch: int = CPU_CAPTION_BATCH
    compile: bool = False
    recompute: bool = False
    seed: int = 0


def caption_batch(config: RunConfig, device: torch.device) -> int:
    """Return the number of captions per pass through a frozen text tower, of teacher or student."""
    images = -(-config.recipe.batch_size // (config.processes * config.accumulate))
    return caption_batch_size(images, device)


def step_settings(config: RunConfig, autocast: torch.dtype | None, device: torch.device) -> StepSettings:
    return StepSettings(
        autocast=autocast,
        chunks=config.accumulate,
        block=config.loss_block,
        global_logits=config.global_logits,
        freeze_text=config.freeze_text,
        caption_batch=caption_batch(config, device),
        compile=config.compile,
        recompute=config.gradient_checkpointing,
        seed=config.seed,
    )


class TrainingStep:
    """Computes the loss of a batch and accumulates gradients in the student's and the objective's parameters.

    Args:
        image_tower: a module that computes the student's image embeddings in another way from the same parameters, such
            as with INT8 rounding; None for the plain tower.
    """

    def __init__(
        self,
        student: ClipModel,
        teacher: BatchTeacher | None,
        objective: Objective,
        processes: Processes,
        settings: StepSettings,
        *,
        image_tower: nn.Module | None = None,
        bank: TeacherBank | None = None,
    ) -> None:
        self.student, self.teacher, self.objective, self.bank = student, teacher, objective, bank
        self.processes, self.settings = processes, settings
        self._normalise = Normaliser(student.preprocessing, processes.device)
        self._image_tower: nn.Module = image_tower or ImageTower(student.model)
        text_tower = TextTower(student.model)
        if processes.device.type == "cpu":
            take_strides_first(student.model)
        if settings.compile:
            self._image_tower.compile()
            text_tower.compile()
        elif processes.device.type == "cpu":
            speed_up_small_maps(student.model)
        # Each length would be compiled apart.
        self._text_tower = CaptionTower(text_tower, student.model, choices=() if settings.compile else LENGTHS)
        embed_texts: EmbedTexts = self._embed_captions
        if settings.freeze_text:
            embed_texts = FrozenTextTower(
                student, processes.device, autocast=settings.autocast, caption_batch=settings.caption_batch
            )
        self._towers = _Towers(student.model, self._image_tower, embed_texts)
        self._synchronised = processes.synchronised(self._towers)

    def __call__(self, batch: Batch, step: int, *, loss_scale: float | Tensor = 1.0) -> StepResult:
        """Compute one step. A step whose loss is not finite is to be skipped, and does not spoil those that follow.

        Nothing is read back from the device, whose queue of kernels stays full; only a bank of past embeddings, and a
        teacher that chooses texts, wait for it.

        Args:
            batch: this process's part of the global batch.
            step: counted from 0.
            loss_scale: factor on all gradients, for float16.
        """
        model, processes = self.student.model, self.processes
        processes.broadcast(model.buffers())
        # Activations that exceed float16's range would stay in the statistics of batch norms.
        buffers = _buffer_values(model) if self.settings.autocast is torch.float16 else None
        size = -(-len(batch.captions) // self.settings.chunks)
        chunks = [_part(batch, slice(start, start + size)) for start in range(0, len(batch.captions), size)]
        targets = [self.teacher.embed(chunk) for chunk in chunks] if self.teacher else []
        if targets:  # a teacher may have chosen other captions
            chunks = [
                chunk if own.captions is chunk.captions else replace(chunk, captions=own.captions, student_ids=None)
                for chunk, own in zip(chunks, targets, strict=True)
            ]
        if len(chunks) == 1:
            image, text = self._embed(self._synchronised, chunks[0], step, 0)
        else:
            image, text = self._embed_without_graph(chunks, step)
        embeddings = self._gather(chunks, targets, image, text)
        scoring = [getattr(model, name, None) for name in ("logit_scale", "logit_bias")]
        # Leaves of their own: the towers' parameters belong to their backward pass alone.
        leaves = [p if p is None else p.detach().clone().requires_grad_(p.requires_grad) for p in scoring]
        loss, gradients = self._backward_to_embeddings(embeddings, leaves, loss_scale)
        if len(chunks) == 1:
            self._backward((image, text), gradients)
        else:
            sizes = [len(chunk.captions) for chunk in chunks]
            parts = zip(*(torch.split(gradient, sizes) for gradient in gradients), strict=True)
            for number, (chunk, part) in enumerate(zip(chunks, parts, strict=True)):
                is_last = number == len(chunks) - 1
                with nullcontext() if is_last else processes.accumulate(self._synchronised):
                    self._backward(self._embed(self._synchronised, chunk, step, number), list(part))
        for parameter, leaf in zip(scoring, leaves, strict=True):
            if parameter is not None and leaf is not None:
                parameter.grad = leaf.grad
        if buffers is not None:
            is_finite = loss.total.isfinite()
            kept = [torch.where(is_finite, new, old) for new, old in zip(model.buffers(), buffers, strict=True)]
            _restore_buffers(model, kept)
        if isinstance(self.bank, QueueBank) and not loss.total.isfinite():
            self.bank.drop_not_finite()
        return StepResult(loss, embeddings)

    def _embed(self, towers: nn.Module, batch: Batch, step: int, chunk: int) -> tuple[Tensor, Tensor]:
        device, autocast = self.processes.device, self.settings.autocast
        # Random draws depend only on the position in the run, so a second pass or a resumed run repeats them.
        sequence = np.random.SeedSequence((self.settings.seed, step, self.processes.rank, chunk))
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
        pixels = batch.student_pixels
        if pixels.numel():  # else there are texts alone
            pixels = self._normalise(pixels)
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            image, text = towers(pixels, batch.captions, batch.student_ids)
        return image, text

    def _embed_captions(self, captions: list[str], ids: Tensor | None) -> Tensor:
        embeddings: Tensor = self._text_tower(self.student.tokenizer(captions) if ids is None else ids)
        return embeddings

    @torch.no_grad()
    def _embed_without_graph(self, chunks: list[Batch], step: int) -> tuple[Tensor, Tensor]:
        with _buffers_kept(self.student.model):  # a second pass, with a graph, follows
            embedded = [self._embed(self._towers, chunk, step, i) for i, chunk in enumerate(chunks)]
        images, texts = zip(*embedded, strict=True)
        return torch.cat(images), torch.cat(texts)

    def _backward(self, outputs: tuple[Tensor, Tensor], gradients: list[Tensor]) -> None:
        """Backpropagate through the outputs that have a graph; a frozen tower has none."""
        pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad]
        with _buffers_kept(self.student.model) if self.settings.recompute else nullcontext():
            torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
        if self.settings.compile and self.settings.chunks > 1:
            # torch takes such gradients over as they are, also views of one buffer; the next chunk adds to them.
            for parameter in self._towers.parameters():
                parameter.grad = None if parameter.grad is None else parameter.grad.clone()

    def _gather(self, chunks: list[Batch], targets: list[Targets], image: Tensor, text: Tensor) -> EmbeddingBatch:
        local = [image.detach().float(), text.detach().float()]
        if targets:
            local.append(torch.cat([own.image for own in targets]).float())
            local.append(torch.cat([own.text for own in targets]).float())
        mixed = chunks[0].paired is not None  # in one process, then in all: it depends on the data set
        if mixed:
            flags = [flag for chunk in chunks for flag in chunk.paired or ()]
            local.append(torch.tensor(flags).to(image.device, non_blocking=True).float()[:, None])
        student_image, student_text, *teacher = self.processes.gather(local)
        paired = teacher.pop()[:, 0] > 0 if mixed else None
        student = student_image.requires_grad_(), student_text.requires_grad_()
        if not teacher:
            return EmbeddingBatch(*student, paired=paired)
        teacher_image, teacher_text = teacher
        bank = self.bank.with_batch(teacher_image, teacher_text) if self.bank is not None else None
        return EmbeddingBatch(*student, teacher_image, teacher_text, bank, paired)

    def _backward_to_embeddings(
        self, embeddings: EmbeddingBatch, scoring: list[Any], loss_scale: float | Tensor
    ) -> tuple[LossTerms, list[Tensor]]:
        """Backpropagate this process's share of the loss to the global embeddings.

        Returns:
            The global loss, and the gradients of this process's image and text embeddings. Those of the scales and of
            the objective's other parameters are summed over processes in the same message.
        """
        processes, settings, (log_scale, bias) = self.processes, self.settings, scoring
        pairs = len(embeddings.student_image)
        local = pairs // processes.world_size
        start, stop = (0, pairs) if settings.global_logits else (processes.rank * local, (processes.rank + 1) * local)
        size = settings.block or stop - start
        share = 1 / processes.world_size if settings.global_logits else 1.0
        total, terms = torch.zeros((), device=processes.device), dict[str, Tensor]()
        for first in range(start, stop, size):
            block = None if size == pairs else slice(first, min(first + size, stop))
            teacher_scale = self.teacher.logit_scale if self.teacher else 0.0
            loss = self.objective(embeddings, log_scale.exp(), teacher_scale, block=block, student_bias=bias)
            torch.autograd.backward([loss_scale * share * loss.total])
            total += share * loss.total.detach()
            for name, term in loss.terms.items():
                terms[name] = terms.get(name, 0.0) + share * term.detach()
        leaves = (embeddings.student_image, embeddings.student_text)
        summed = [leaf.grad for leaf in (*leaves, log_scale, *self.objective.parameters())]
        summed += [] if bias is None else [bias.grad]
        processes.all_reduce([total, *terms.values(), *summed])
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        return LossTerms(total, terms), list(map(processes.local_part, gradients))


class _Towers(nn.Module):
    """Both towers in one forward pass, whose backward pass is synchronised as a whole."""

    def __init__(self, model: nn.Module, image_tower: nn.Module, embed_texts: EmbedTexts) -> None:
        super().__init__()
        self.model = model  # the parameters of both
        self.image_tower = image_tower
        self._embed_texts = embed_texts

    def forward(self, pixels: Tensor, captions: list[str], ids: Tensor | None) -> tuple[Tensor, Tensor]:
        image = self.image_tower(pixels) if pixels.numel() else None
        text = self._embed_texts(captions, ids)
        return torch.zeros_like(text) if image is None else image, text


def _part(batch: Batch, part: slice) -> Batch:
    pixels, ids, embeddings, paired = batch.teacher_pixels, batch.student_ids, batch.teacher_embeddings, batch.paired
    return Batch(
        batch.student_pixels[part],
        tuple(images[part] for images in pixels),
        batch.captions[part],
        teacher_embeddings=None if embeddings is None else (embeddings[0][part], embeddings[1][part]),
        paired=None if paired is None else paired[part],
        student_ids=None if ids is None else ids[part],
        teacher_ids=tuple(own[part] for own in batch.teacher_ids),
    )


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Undo what the block does to a model's buffers: batch norms would count a batch that passes twice as two."""
    saved = _buffer_values(model)
    yield
    _restore_buffers(model, saved)


def _buffer_values(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


@torch.no_grad()
def _restore_buffers(model: nn.Module, values: list[Tensor]) -> None:
    for buffer, own in zip(model.buffers(), values, strict=True):
        buffer.copy_(own)


@torch.no_grad()
def clamp_scales(student: nn.Module, objective: Objective) -> None:
    """Clamp the student's logit scale to [1, 100], as CLIP does, and the objective's scales to their range.

    SigLIP's models, which have a bias, have scales above 100, and are trained without bounds.
    """
    if getattr(student, "logit_bias", None) is None:
        log_logit_scale: Tensor = student.get_parameter("logit_scale")
        log_logit_scale.clamp_(0.0, math.log(MAX_SCALE))
    objective.scales.clamp_()


AUTOCAST: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
