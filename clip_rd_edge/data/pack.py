"""Any training data as WebDataset shards of small images, which many runs then read fast.

    pack.json     what the shards are made from, written first
    00000.tar     SHARD_SAMPLES samples, in an order of chance: an image, and its caption as .txt or several in a .json
    00000.json    how many samples that has, and which were bad; written after it

Each file is whole or absent. A repeated call makes the shards that are missing.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
from PIL import Image

from clip_rd_edge.bundle.encoder import in_batches
from clip_rd_edge.bundle.images import MAX_PIXELS, ImageFile, opened_image, to_rgb
from clip_rd_edge.data.order import EpochOrder
from clip_rd_edge.data.samples import BadPair, BadSamples, Sample, Samples, fingerprint, read_twice
from clip_rd_edge.data.webdataset import JSON_KEY
from clip_rd_edge.errors import InputError, UsageError
from clip_rd_edge.utils.files import new_file, write_bytes
from clip_rd_edge.utils.host import usable_cores
from clip_rd_edge.utils.outputs import exclusive_writer
from clip_rd_edge.utils.paths import is_file, is_left_by_system
from clip_rd_edge.utils.reporting import SILENT, Reporter
from clip_rd_edge.utils.structs import read_json, to_json

SHARD_SAMPLES = 4096  # some 250 MB of JPEGs whose shorter edge has 512 pixels
QUALITY = 90
_RECORD = "pack.json"
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # of what shards may hold as it is


class _Made(msgspec.Struct, frozen=True, kw_only=True):
    """Content of pack.json: what decides what is in the shards, but for `data`, which names it for people."""

    data: str
    samples: int
    samples_sha256: str
    edge: int


class _Shard(msgspec.Struct, frozen=True):
    """Content of the file beside a shard: its samples, its size in bytes, and what is left out."""

    samples: int
    bytes: int
    bad: tuple[BadPair, ...] = ()


class Packed(NamedTuple):
    """Shards: what names them for `data` of `distill`, what is in all of them, and how many samples were unreadable."""

    source: str
    samples: int
    bytes: int
    left_out: int


def pack_samples(samples: Samples, folder: Path, *, edge: int, max_bad: float, reporter: Reporter = SILENT) -> Packed:
    """Write the samples into shards in `folder`, or go on where an earlier call was interrupted.

    An image whose shorter edge has more than `edge` pixels becomes a JPEG with that edge; a smaller one stays as it is,
    byte for byte, if it is a JPEG, PNG or WebP.

    Args:
        max_bad: max share of samples that cannot be read.
        reporter: receives the number of finished samples.
    """
    made = _Made(data=samples.name, samples=len(samples), samples_sha256=fingerprint(samples), edge=edge)
    order, parts = EpochOrder(samples.groups, seed=0), in_batches(len(samples), SHARD_SAMPLES)
    names = [f"{number:05d}" for number in range(len(parts))]
    bad, found = BadSamples(samples, max_share=max_bad), list[_Shard]()
    with exclusive_writer(folder, on_wait=reporter.note), ThreadPoolExecutor(usable_cores()) as pool:
        _begin(folder, made)

        def packed(part: slice) -> Iterator[tuple[int, dict[str, bytes] | str]]:
            for few in in_batches(part.stop - part.start, 16 * usable_cores()):
                reporter.update("packing", part.start + few.start, len(samples))
                rows = order.indices(0, part.start + few.start, part.start + few.stop).tolist()
                yield from zip(rows, pool.map(partial(_content, samples, edge), rows), strict=True)

        for part, name in zip(parts, names, strict=True):
            shard, record = folder / f"{name}.tar", folder / f"{name}.json"
            # The record is written last.
            if not (is_file(record) and is_file(shard) and read_json(record, _Shard).bytes == shard.stat().st_size):
                write_bytes(record, to_json(_write(shard, packed(part))))
            found.append(read_json(record, _Shard))
            bad.add(found[-1].bad)
    reporter.update("packing", len(samples), len(samples))
    if bad.summary:
        reporter.note(bad.summary)
    source = folder / (f"{{{names[0]}..{names[-1]}}}.tar" if names[1:] else f"{names[0]}.tar")
    return Packed(str(source), sum(shard.samples for shard in found), sum(shard.bytes for shard in found), len(bad))


def _begin(folder: Path, made: _Made) -> None:
    """Write pack.json, or compare it; refuse a folder with anything else."""
    if not is_file(folder / _RECORD):
        if any(not path.name.startswith(".") and not is_left_by_system(path) for path in folder.iterdir()):
            raise UsageError(f"{folder} is neither empty nor packed data.", option="output")
        write_bytes(folder / _RECORD, to_json(made))
    old, new = (msgspec.to_builtins(one) for one in (read_json(folder / _RECORD, _Made), made))
    changed = [f"{name}: {old[name]} → {new[name]}" for name in new if name != "data" and old[name] != new[name]]
    if changed:
        raise UsageError(
            f"{folder} was packed from other data, or in another way: {', '.join(changed)}.",
            hint="choose another {output}",
            option="output",
        )


def _write(path: Path, packed: Iterable[tuple[int, dict[str, bytes] | str]]) -> _Shard:
    """Write a shard of the files of these rows, which are named by their numbers, without those that are bad."""
    bad, count = list[BadPair](), 0
    with new_file(path) as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for row, content in packed:
                if isinstance(content, str):
                    bad.append((row, content))
                    continue
                count += 1
                for suffix, data in content.items():
                    member = tarfile.TarInfo(f"{row:09d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        size = file.tell()
    return _Shard(count, size, tuple(bad))


def _content(samples: Samples, edge: int, row: int) -> dict[str, bytes] | str:
    """Return the files of a sample by their suffixes; why it is bad, if it is."""

    def read(index: int) -> dict[str, bytes]:
        sample: Sample = samples.read(index)
        assert sample.file is not None
        suffix, image = packed_image(sample.file, edge)
        texts = sample.captions
        if len(texts) == 1:
            return {suffix: image, "txt": texts[0].encode()}
        return {suffix: image, **({"json": msgspec.json.encode({JSON_KEY: texts})} if texts else {})}

    try:
        return read_twice(read, row)
    except InputError as error:
        return str(error)


def packed_image(file: ImageFile, edge: int) -> tuple[str, bytes]:
    """Return the suffix and the content of an image file in a shard: its shorter edge has at most `edge` pixels."""
    content = io.BytesIO()
    with opened_image(file, MAX_PIXELS) as image:
        suffix, ratio = _SUFFIXES.get(image.format or ""), min(image.size) / edge
        image.draft("RGB", (2 * edge, 2 * edge))
        rgb = to_rgb(image)  # a damaged one raises an error, also where the file itself is taken
        if ratio <= 1 and suffix:
            return suffix, file.read_bytes()
        if ratio > 1:
            scale = edge / min(rgb.size)
            rgb = rgb.resize((round(rgb.width * scale), round(rgb.height * scale)), Image.Resampling.LANCZOS)
        rgb.save(content, "JPEG", quality=QUALITY)
    return "jpg", content.getvalue()
