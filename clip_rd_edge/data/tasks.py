"""Tasks by name, folder or file."""

from __future__ import annotations

from pathlib import Path

from clip_rd_edge.contract.task import RetrievalTask, Task
from clip_rd_edge.data.clip_benchmark import (
    Fallback,
    find_data_set,
    image_folder_task,
    neutral,
    retrieval_from_shards,
    shard_task,
)
from clip_rd_edge.data.pairs import TAR_ENDINGS
from clip_rd_edge.data.tables import TablePairs, read_table
from clip_rd_edge.data.tars import open_shard
from clip_rd_edge.data.webdataset import parse_sources
from clip_rd_edge.errors import InputError, near_matches

TABLES = (".csv", ".tsv")
EMBEDDED = (
    "emoji:unseen-style",
    "emoji:unseen-concepts",
    "emoji:unseen-style:retrieval",
    "emoji:unseen-concepts:retrieval",
)


def load_task(name: str, *, fallback: Fallback = neutral) -> Task:
    """A task by what a user has of it.

    - A name in EMBEDDED: the embedded data set's.
    - A folder with one sub-folder of pictures a class, as torchvision has it: classes are the sub-folders in
      alphabetical order (by number where all are numbers). Its `test`, else `val`, is taken where there is one.
    - A folder of WebDataset shards as CLIP_benchmark exports it: `test/nshards.txt`, `test/0.tar`, …
    - Pairs, for retrieval: a CSV or TSV file, or shards (`val/{000..003}.tar`). A picture that stands in several
      lines of a table has several captions.

    For what may lie beside the pictures see `data.metadata`.

    Args:
        fallback: gives the templates of a zero-shot data set that has none of its own.

    Raises:
        InputError: no such task or folder, an empty one, or something in it that does not fit.
    """
    if name in EMBEDDED:
        from clip_rd_edge.data import emoji

        split: emoji.Split = "unseen style" if "unseen-style" in name else "unseen concepts"
        return emoji.retrieval_task(split) if name.endswith(":retrieval") else emoji.zero_shot_task(split)
    if name.endswith(TAR_ENDINGS):
        shards = [open_shard(path) for source in parse_sources(name) for path in source.shards]
        return retrieval_from_shards(name, shards)
    path = Path(name)
    if name.endswith(TABLES) and path.is_file():
        return _from_table(read_table(path, image_key="filepath", caption_key="title", separator=None), path.stem)
    if not path.is_dir():
        raise InputError(
            f"There is no task {name!r}: neither a folder of pictures nor one of {', '.join(EMBEDDED)}."
            f"{near_matches(name, EMBEDDED)}"
        )
    data = find_data_set(path)
    return shard_task(data, fallback) if data.in_shards else image_folder_task(data, fallback)


def _from_table(pairs: TablePairs, name: str) -> RetrievalTask:
    images = list(dict.fromkeys(pairs.images))
    place = {path: index for index, path in enumerate(images)}
    said = [(caption, place[path]) for path, texts in zip(pairs.images, pairs.texts, strict=True) for caption in texts]
    return RetrievalTask(
        name=name,
        images=tuple(images),
        captions=tuple(caption for caption, _ in said),
        caption_images=tuple(index for _, index in said),
    )
