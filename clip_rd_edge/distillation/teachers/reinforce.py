"""Write reinforced shards in MobileCLIP's format: pairs with strong augmentations and what teachers say of them.

    00000.tar, …        PAIRS_PER_SHARD pairs each, see `data.reinforced`
    teachers.json       whose embeddings they are, for `--teacher stored:FOLDER/teachers.json`
    reinforced.json     what they depend on

The augmentations are RandAugment's (Cubuk et al. 2020), two operations at magnitude 9 of 30 as in torchvision and in
MobileCLIP, on a crop within the recipe's range. Of several captions of a pair, the first is its own, and the others
take the places of synthetic ones.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import msgspec
import numpy as np
import torch
from PIL import Image

from clip_rd_edge.contract.preprocess import Preprocessing
from clip_rd_edge.data.pairs import BadPair, BadSamples, Pairs, fingerprint, read_twice
from clip_rd_edge.data.reinforced import OPERATIONS, Augmentation, StoredTeacher, StoredTeachers
from clip_rd_edge.data.unpaired import MixedSamples
from clip_rd_edge.distillation.batches.loader import HalfArray
from clip_rd_edge.distillation.batches.pixels import Crops
from clip_rd_edge.distillation.batches.reinforced import augment, resized
from clip_rd_edge.distillation.build import training_pairs
from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.processes.distributed import Processes, join_processes
from clip_rd_edge.distillation.step import AUTOCAST
from clip_rd_edge.distillation.teachers.embedding_store import claim_folder
from clip_rd_edge.distillation.teachers.store_build import BATCH_SIZE, count_recorded, record_bad, share_bad
from clip_rd_edge.distillation.teachers.teacher import (
    Teacher,
    caption_batch_size,
    ensemble_of,
    load_models_to_embed_with,
)
from clip_rd_edge.errors import InputError, UsageError
from clip_rd_edge.models.clip import default_device, model_fingerprint
from clip_rd_edge.models.defaults import float32_on_cpu
from clip_rd_edge.utils.arrays import npz_bytes
from clip_rd_edge.utils.files import new_file, write_bytes
from clip_rd_edge.utils.paths import is_file
from clip_rd_edge.utils.reporting import SILENT, Reporter
from clip_rd_edge.utils.structs import to_json

PAIRS_PER_SHARD = 1000
TEACHERS_FILE, _MANIFEST = "teachers.json", "reinforced.json"
_STAGE = "reinforcing pairs (shards)"
_OPERATIONS_PER_IMAGE, _STRENGTH = 2, 9 / 30
_MAX_JPEG_EDGE = 65_500  # of libjpeg
_QUALITY = 95  # of the JPEGs, which teachers and students see alike


class ReinforcedManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that reinforced shards depend on."""

    format_version: int = 2
    teachers_sha256: tuple[str, ...]
    preprocessing: tuple[Preprocessing, ...] = ()  # of each teacher; the first version did not have it
    pairs_sha256: str
    image_size: int
    crops: Crops
    seed: int
    augmentations: int
    precision: str


@float32_on_cpu()
def reinforce(config: RunConfig, folder: Path, *, reporter: Reporter = SILENT) -> None:
    """Write what is missing of the reinforced shards of a configuration's pairs and teachers.

    Args:
        config: its `views` are the augmentations of each image, its `teacher_precision` is not `auto`.
        reporter: receives the number of completed shards.

    Raises:
        UsageError: the configuration has no teachers or no plain pairs, or `folder` is something else.
        InputError: data or teachers do not exist, or too many pairs cannot be read.
    """
    with join_processes() as processes:
        shown = reporter if processes.is_main else SILENT
        with processes.main_first():
            pairs = training_pairs(config, reporter=shown)
        with processes.together():
            writer = _writer(config, pairs)
        what = "a store of reinforced shards"
        processes.on_main(lambda: claim_folder(folder / _MANIFEST, writer.manifest, what=what, option="--output"))
        _write_shards(folder, writer, processes, shown)
        if processes.is_main:
            write_bytes(folder / TEACHERS_FILE, to_json(writer.stored))
        processes.barrier()


def _writer(config: RunConfig, pairs: Pairs) -> _Writer:
    if isinstance(pairs, MixedSamples):
        raise UsageError(
            "Reinforced shards hold pairs, but images or texts apart were named.", hint="name pairs alone, with --data"
        )
    clips, device = load_models_to_embed_with(config), default_device()
    autocast, captions = AUTOCAST[config.teacher_precision], caption_batch_size(BATCH_SIZE, device)
    teachers = [Teacher(clip, device, autocast=autocast, caption_batch=captions) for clip in clips]
    manifest = ReinforcedManifest(
        teachers_sha256=tuple(map(model_fingerprint, clips)),
        preprocessing=tuple(clip.preprocessing for clip in clips),
        pairs_sha256=fingerprint(pairs),
        image_size=max(max(clip.preprocessing.size) for clip in clips),
        crops=Crops(scale=config.recipe.crop_scale, aspect_ratio=1.0),
        seed=config.seed,
        augmentations=config.views,
        precision=config.teacher_precision,
    )
    return _Writer(manifest, pairs, teachers, max_bad=config.max_bad)


def _write_shards(folder: Path, writer: _Writer, processes: Processes, reporter: Reporter) -> None:
    files = [folder / f"{shard:05d}.tar" for shard in range(-(-len(writer.pairs) // PAIRS_PER_SHARD))]
    with_bad = count_recorded(writer.bad, files, processes)
    mine = range(processes.rank, len(files), processes.world_size)
    for done, shard in enumerate(mine):
        reporter.update(_STAGE, done, len(mine))
        path = files[shard]
        if not is_file(path):
            rows = range(shard * PAIRS_PER_SHARD, min((shard + 1) * PAIRS_PER_SHARD, len(writer.pairs)))
            try:
                with new_file(path) as file:
                    bad = writer.write_shard(rows, file)
                    record_bad(path, bad)
            except InputError:  # too many are bad already, for which all processes are refused below
                break
            with_bad += [path] * bool(bad)
    reporter.update(_STAGE, len(mine), len(mine))
    share_bad(writer.bad, processes, with_bad)
    if writer.bad.summary:
        reporter.say(writer.bad.summary)


class _Writer:
    """Makes the content of shards."""

    def __init__(self, manifest: ReinforcedManifest, pairs: Pairs, teachers: Sequence[Teacher], *, max_bad: float):
        self.manifest, self.pairs, self._teachers = manifest, pairs, teachers
        self.bad = BadSamples(pairs, max_share=max_bad)
        self.stored = StoredTeachers(
            teachers=tuple(
                StoredTeacher(
                    name=teacher.clip.name,
                    embedding_size=teacher.clip.embedding_size,
                    logit_scale=teacher.logit_scale,
                )
                for teacher in teachers
            ),
            image_size=manifest.image_size,
            share_text=ensemble_of([teacher.clip for teacher in teachers]).share_text or msgspec.UNSET,
        )

    def write_shard(self, rows: range, file: IO[bytes]) -> list[BadPair]:
        """Write the tar of these pairs, which may have gigabytes; return those that cannot be read, and are not in it.

        Raises:
            InputError: too many cannot be read.
        """
        bad = list[BadPair]()
        with tarfile.open(fileobj=file, mode="w") as archive:
            for index in rows:
                try:
                    files = read_twice(lambda row: dict(self._files(row)), index)
                except InputError as error:
                    bad.append((index, str(error)))
                    self.bad.add(bad[-1:])
                    continue
                for suffix, data in sorted(files.items()):
                    info = tarfile.TarInfo(f"{index:09d}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        return bad

    def _files(self, index: int) -> Iterator[tuple[str, bytes]]:
        jpeg = io.BytesIO()
        opened = self.pairs.open(index)
        if max(opened.size) > _MAX_JPEG_EDGE:
            raise InputError(
                f"The image of pair {index:,} has {opened.width} × {opened.height} pixels; a JPEG has at most "
                f"{_MAX_JPEG_EDGE:,} along an edge."
            )
        opened.save(jpeg, "JPEG", quality=_QUALITY, subsampling=0)
        image = Image.open(jpeg, formats=["JPEG"]).convert("RGB")
        own, *others = self.pairs.captions(index)
        drawn = [self._draw(image.size, index, number) for number in range(self.manifest.augmentations)]
        parameters = [
            [[a.top, a.left, a.height, a.width], [[OPERATIONS.index(name), m] for name, m in a.operations]]
            for a in drawn
        ]
        arrays = npz_bytes(image_emb=self._embed_images(image, drawn), text_emb=self._embed_captions([own, *others]))
        yield "jpg", jpeg.getvalue()
        yield "txt", own.encode()
        yield "paug.json", msgspec.json.encode({"param_aug": parameters})
        yield "npz", arrays
        if others:
            yield "syn.json", msgspec.json.encode({"syn_text": others})

    def _draw(self, size: tuple[int, int], index: int, number: int) -> Augmentation:
        rng = np.random.default_rng((self.manifest.seed, index, number))
        left, top, right, bottom = (int(edge) for edge in self.manifest.crops.draw(size, rng))
        operations = [draw_operation(rng, self.manifest.image_size) for _ in range(_OPERATIONS_PER_IMAGE)]
        return Augmentation(top, left, max(bottom - top, 1), max(right - left, 1), tuple(operations))

    def _embed_images(self, image: Image.Image, drawn: Sequence[Augmentation]) -> HalfArray:
        shown = [augment(image, augmentation, size=self.manifest.image_size) for augmentation in drawn]
        return _side_by_side(
            [teacher.embed_images(_levels(shown, teacher.clip.preprocessing)) for teacher in self._teachers]
        )

    def _embed_captions(self, captions: list[str]) -> HalfArray:
        return _side_by_side([teacher.embed_captions(captions) for teacher in self._teachers])


def draw_operation(rng: np.random.Generator, image_size: int) -> tuple[str, float]:
    """Draw one of RandAugment's operations, with torchvision's magnitude 9 of 30, as (name, magnitude)."""
    name = OPERATIONS[int(rng.integers(len(OPERATIONS)))]
    sign = 1.0 if rng.random() < 0.5 else -1.0
    if name in ("Identity", "AutoContrast", "Equalize"):
        return name, 0.0
    if name == "Posterize":  # bits that are kept
        return name, 8.0 - round(4 * _STRENGTH)
    if name == "Solarize":  # level from which on pixels are inverted
        return name, 255 * (1 - _STRENGTH)
    if name.startswith("Shear"):
        return name, sign * 0.3 * _STRENGTH
    if name.startswith("Translate"):
        return name, sign * 150 / 331 * image_size * _STRENGTH
    return name, sign * (30 if name == "Rotate" else 0.9) * _STRENGTH


def _levels(images: Sequence[Image.Image], model: Preprocessing) -> torch.Tensor:
    return torch.from_numpy(np.stack([resized(image, model) for image in images])).permute(0, 3, 1, 2)


def _side_by_side(embeddings: Sequence[torch.Tensor]) -> HalfArray:
    joined: HalfArray = torch.cat([part.float().cpu() for part in embeddings], dim=1).numpy().astype(np.float16)
    return joined
