"""Files are grouped into the same samples whether in numpy or one by one, and wherever a batch ends."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest

from clip_rd_edge.data import tar as tar_samples
from clip_rd_edge.data.tar import COLUMNS, SampleGroups, TarFiles

Location = tuple[int, int]
USUAL = ("jpg", "JPG", "jpeg", "png", "webp", "txt", "Txt", "json", "cls")
UNUSUAL = ("", "foo", "jpgx", "jpg2", "seg.png", "jsonl", "t", "jpeg\0x")
STEMS = ("0", "00", "000", "1", "a_b", "a__b", "__meta__", "x/0", "./0", "x.y/0", "", "x/", "x/__meta__/0", "été")


def files_of(names: Sequence[str], first: int = 0) -> TarFiles:
    """Files whose offset and size tell where they are in the list."""
    numbers = np.arange(first, first + len(names), dtype=np.int64)
    return TarFiles(np.asarray([name.encode() for name in names], np.bytes_), numbers * 10, numbers * 10 + 1)


def grouped(names: Sequence[str], ends: Sequence[int]) -> tuple[list[bytes], list[dict[int, Location]], bool]:
    """Group files in batches with these ends: names, locations by column, and whether the last file is in a sample."""
    groups = SampleGroups()
    for start, end in itertools.pairwise([0, *ends]):
        groups.add(files_of(names[start:end], start))
    locations = [
        {column: (offset, size) for column, (offset, size) in enumerate(sample) if offset >= 0}
        for sample in groups.locations().tolist()
    ]
    return groups.names(len(groups)).tolist(), locations, groups.last_is_in_sample


def image_locations(names: Sequence[str]) -> list[list[int]]:
    """The locations of images by the rules written for reading."""
    return [list(sample.get(0, (-1, 0))) for sample in expected(names)[1]]


def expected(names: Sequence[str]) -> tuple[list[bytes], list[dict[int, Location]], bool]:
    """The rules once more, written for reading."""
    columns = {"jpg": 0, "png": 0, "jpeg": 0, "webp": 0, "txt": 1, "json": 2, "cls": 3}
    samples: list[tuple[str, set[str], dict[str, Location]]] = []
    is_in_sample = False
    for number, name in enumerate(names):
        folder, slash, file = name.rpartition("/")
        stem, _, suffix = file.partition(".")
        parts = [*folder.split("/"), stem] if suffix else name.split("/")
        is_meta = any(part.startswith("__") and part.endswith("__") and len(part) >= 4 for part in parts)
        is_in_sample = bool(stem and suffix) and not is_meta
        if not is_in_sample:
            continue
        sample, suffix = folder + slash + stem, suffix.lower()
        if not samples or samples[-1][0] != sample or suffix in samples[-1][1]:
            samples.append((sample, set(), {}))
        samples[-1][1].add(suffix)
        samples[-1][2][suffix] = (10 * number, 10 * number + 1)
    # Of several images, the first in the order of `columns` counts.
    locations = [
        {column: sample[suffix] for suffix, column in reversed(columns.items()) if suffix in sample}
        for _, _, sample in samples
    ]
    return [name.encode() for name, _, _ in samples], locations, is_in_sample


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5], ids=["usual", "few unusual", "many unusual"])
def test_random_names_are_grouped_as_one_by_one_in_batches_of_any_size(share: float) -> None:
    generator = random.Random(0)
    for _ in range(300):
        names: list[str] = []
        while len(names) < 60:
            usual = generator.random() >= share
            stem = generator.choice(STEMS[:5] if usual else STEMS)
            suffixes = generator.sample(USUAL if usual else USUAL + UNUSUAL, generator.randint(1, 4))
            names += [f"{stem}.{suffix}" if suffix else stem for suffix in suffixes if stem or suffix]
        ends = [*sorted(generator.sample(range(len(names)), generator.randint(0, 6))), len(names)]
        assert grouped(names, ends) == expected(names), (names, ends)


def test_names_in_folders_are_grouped_as_one_by_one() -> None:
    names = [f"{folder}/{i // 3}.{['jpg', 'txt', 'json'][i % 3]}" for folder in (".", "a.b", "c") for i in range(30)]
    assert grouped(names, [7, 50, len(names)]) == expected(names)


def test_usual_names_are_not_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0
    add_each = SampleGroups._add_each

    def watch(self: SampleGroups, files: TarFiles, start: int, stop: int) -> None:
        nonlocal seen
        seen += stop - start
        add_each(self, files, start, stop)

    monkeypatch.setattr(SampleGroups, "_add_each", watch)
    names = [f"./{i // 3:06d}.{['jpg', 'txt', 'json'][i % 3]}" for i in range(3000)]
    assert grouped(names, [1000, 2000, 3000]) == expected(names)
    assert seen <= 4  # what goes on with the sample of the batch before


@pytest.mark.parametrize("together", [1, 7, 64, 10_000])
def test_batches_are_put_together_in_their_order(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    monkeypatch.setattr(tar_samples, "_GROUPED_TOGETHER", together)
    names = [f"{'long' * (i % 5)}{i // 3}.{('jpg', 'txt', 'json')[i % 3]}" for i in range(200)]
    ends = [0, 5, 5, 40, 41, 170, 200]
    groups = SampleGroups()
    groups.add_all(files_of(names[start:end], start) for start, end in itertools.pairwise([0, *ends]))
    assert groups.names(len(groups)).tolist() == expected(names)[0]
    assert groups.locations()[:, 0].tolist() == image_locations(names)


def test_no_files_make_no_samples() -> None:
    groups = SampleGroups()
    groups.add(files_of([]))
    assert (len(groups), len(groups.names(0)), groups.locations().shape) == (0, 0, (0, len(COLUMNS), 2))


def test_of_several_images_in_a_sample_the_one_that_open_clip_takes_counts() -> None:
    names = ("a.webp", "a.png", "a.jpg", "a.txt", "b.jpeg", "b.txt", "b.png", "c.webp", "c.jpeg")
    assert image_locations(names) == [[20, 21], [60, 61], [80, 81]]
    assert [sample[0] for sample in grouped(names, [len(names)])[1]] == [(20, 21), (60, 61), (80, 81)]
