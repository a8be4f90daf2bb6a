"""What the current student of a run answers about sample images, while the run goes on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from clip_rd_edge.benchmarking.samples import thumbnail_of
from clip_rd_edge.contract.checkpoint import STUDENT_FOLDER, WEIGHTS_FILE
from clip_rd_edge.contract.encoder import label_embeddings, probabilities
from clip_rd_edge.contract.images import open_image
from clip_rd_edge.contract.run_folder import RUN_CONFIG_FILE
from clip_rd_edge.contract.task import RetrievalTask
from clip_rd_edge.data.tasks import load_task
from clip_rd_edge.data.unpaired import pair_count
from clip_rd_edge.distillation.build import training_pairs
from clip_rd_edge.distillation.checkpoint import STATE_FILE, list_checkpoints, read_weights
from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.student import empty_student
from clip_rd_edge.errors import ClipRdEdgeError, InputError
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import load_clip
from clip_rd_edge.utils.paths import file_identity
from clip_rd_edge.utils.printable import one_line
from clip_rd_edge.utils.structs import read_yaml
from clip_rd_edge.web.watch.state import Answers, SampleAnswer

SAMPLES = 12  # images
MAX_LABELS = 64  # of a task with more; embedding a thousand would take the time of many training steps

_Identity = tuple[int, ...] | None  # of a file, as `file_identity` returns it


@dataclass(frozen=True)
class _Samples:
    """N images, the C texts to choose from, and for each image the index of its own."""

    images: Sequence[Image.Image]
    texts: Sequence[str]
    targets: Sequence[int]
    templates: tuple[str, ...]
    among: str


class StudentAnswers:
    """The answers of a run's newest student, computed in the background when there is a newer one.

    A run that was removed and begun again in the same folder is another one: nothing of the former is kept.

    Args:
        run: folder of the run.
        task: where the images come from; None takes the run's first task, else its training pairs.
        threads: for computing.
    """

    def __init__(self, run: Path, *, task: str | None = None, threads: int = 1) -> None:
        self._run, self._task, self._threads = run, task, threads
        self._worker: threading.Thread | None = None
        self._forget()

    def _forget(self) -> None:
        self._config_identity = file_identity(self._run / RUN_CONFIG_FILE)
        self._samples: _Samples | None = None
        self._student: ClipModel | None = None
        self._answered: tuple[Path, _Identity] | None = None  # the checkpoint or student that the answers are of
        self._answers = Answers()

    def __call__(self) -> Answers:
        """Return the last answers at once; if there is a newer student, begin to compute its answers."""
        if self._worker and self._worker.is_alive():
            return self._answers
        newest = self._newest()
        if newest is not None and (newest, _weights_identity(newest)) != self._answered:
            self._worker = threading.Thread(target=self._update, args=(newest,), daemon=True)
            self._worker.start()
        return self._answers

    def compute(self) -> Answers:
        """Return the answers of the newest student; empty if there is none yet."""
        newest = self._newest()
        if newest is not None:
            self._update(newest)
        return self._answers

    def _newest(self) -> Path | None:
        """Return the newest student or checkpoint; if it is another run by now, what is known of the former is gone."""
        if file_identity(self._run / RUN_CONFIG_FILE) != self._config_identity:
            self._forget()
        student = self._run / STUDENT_FOLDER
        if (student / WEIGHTS_FILE).is_file():
            return student
        checkpoints = list_checkpoints(self._run)
        return checkpoints[-1] if checkpoints else None

    def _update(self, source: Path) -> None:
        identity = _weights_identity(source)  # before it is read: what replaces it meanwhile is newer
        try:
            config = read_yaml(self._run / RUN_CONFIG_FILE, RunConfig)
            self._samples = self._samples or _choose_samples(config, self._task)
            self._answers = self._answer(config, self._samples, source)
        except (ClipRdEdgeError, OSError, RuntimeError) as error:
            if not source.exists():
                return  # the run has replaced this checkpoint by a newer one, which is next
            self._answers = Answers(problem=f"There are no sample answers: {one_line(error)}")
        self._answered = source, identity

    def _answer(self, config: RunConfig, samples: _Samples, source: Path) -> Answers:
        if source.name == STUDENT_FOLDER:
            student, step = load_clip(str(source)), None
        else:
            step = int(source.name.removeprefix("step-"))
            if self._student is None:
                self._student = empty_student(config, name=self._run.resolve().name)
            student = self._student
            student.model.load_state_dict(read_weights(source))
        encoder = TorchEncoder(student, threads=self._threads)
        images = encoder.encode_images(samples.images)
        texts = label_embeddings(encoder, samples.texts, samples.templates)
        rows = probabilities(images, texts, student.logit_scale)
        return Answers(
            step=step,
            among=samples.among,
            samples=tuple(
                SampleAnswer(
                    png=thumbnail_of(image),
                    truth=samples.texts[target],
                    answer=samples.texts[int(row.argmax())],
                    probability=float(row.max()),
                    right=int(row.argmax()) == target,
                )
                for image, target, row in zip(samples.images, samples.targets, rows, strict=True)
            ),
        )


def _weights_identity(source: Path) -> _Identity:
    return file_identity(source / (WEIGHTS_FILE if source.name == STUDENT_FOLDER else STATE_FILE))


def _choose_samples(config: RunConfig, task: str | None) -> _Samples:
    """Choose sample images at random, always the same for the same run."""
    name = task or (config.tasks[0] if config.tasks else None)
    rng = np.random.default_rng(config.seed)
    if name is None:
        return _from_pairs(config, rng)
    loaded = load_task(name, image_key=config.csv_img_key, caption_key=config.csv_caption_key)
    count = min(SAMPLES, len(loaded.images))
    chosen = sorted(rng.permutation(len(loaded.images))[:count].tolist())
    images = [open_image(loaded.images[index]) for index in chosen]
    if isinstance(loaded, RetrievalTask):
        first_captions = loaded.first_captions()
        texts = [loaded.captions[first_captions[index]] for index in chosen]
        return _Samples(images, texts, range(count), ("{}",), f"among the captions of these {count} of {loaded.name}")
    own = [loaded.targets[index] for index in chosen]
    others = [int(label) for label in rng.permutation(len(loaded.labels)) if label not in own]
    labels = sorted([*dict.fromkeys(own), *others[: max(MAX_LABELS - len(set(own)), 0)]])
    return _Samples(
        images,
        [loaded.labels[label] for label in labels],
        [labels.index(label) for label in own],
        loaded.templates[:1],
        f"among {len(labels):,} of the {len(loaded.labels):,} labels of {loaded.name}"
        if len(labels) < len(loaded.labels)
        else f"among the {len(labels):,} labels of {loaded.name}",
    )


def _from_pairs(config: RunConfig, rng: np.random.Generator) -> _Samples:
    pairs = training_pairs(config)
    images: list[Image.Image] = []
    texts: list[str] = []
    if not pair_count(pairs):
        raise InputError("the run has neither a task nor pairs, so that no right answer is known.")
    for index in rng.permutation(pair_count(pairs)):
        try:
            image, text = pairs.open(int(index)), pairs.captions(int(index))[0]
        except ClipRdEdgeError:  # a bad sample, which the run skips, too
            continue
        if text not in texts:
            images.append(image)
            texts.append(text)
        if len(images) == SAMPLES:
            break
    return _Samples(
        images, texts, range(len(images)), ("{}",), f"among the captions of these {len(images)} training pairs"
    )
