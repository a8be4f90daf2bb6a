"""Load evaluation tasks by name, folder or file."""

from __future__ import annotations

from pathlib import Path

from clip_rd_edge.bundle.task import RetrievalTask, Task
from clip_rd_edge.data.clip_benchmark import (
    find_data_set,
    image_folder_task,
    retrieval_from_shards,
    shard_task,
)
from clip_rd_edge.data.load import names_shards
from clip_rd_edge.data.shards.tars import current_versions, open_shard
from clip_rd_edge.data.shards.webdataset import parse_sources
from clip_rd_edge.data.tables.load import TablePairs, read_table
from clip_rd_edge.errors import InputError, near_matches, quoted
from clip_rd_edge.utils.paths import Typed, is_file, is_folder, near_files
from clip_rd_edge.utils.text import shown_source

BUILT_IN_TASKS = (
    "emoji:unseen-style",
    "emoji:unseen-concepts",
    "emoji:unseen-style:retrieval",
    "emoji:unseen-concepts:retrieval",
)


def load_task(name: Typed, *, image_key: str = "filepath", caption_key: str = "title") -> Task:
    """Load a task. `name` is one of:

    - A name in BUILT_IN_TASKS: a task of the built-in data set.
    - A folder with one subfolder of images per class, as in torchvision. The classes are the subfolders in alphabetical
      order, or in numerical order if all names are numbers. Its subfolder `test`, or else `val`, is used if it exists.
    - A folder of WebDataset shards as exported by CLIP_benchmark: `test/nshards.txt`, `test/0.tar`, …
    - Pairs, for retrieval: a table (CSV, TSV or Parquet), or shards (`val/{000..003}.tar`). An image in several lines
      of a table has several captions.

    Args:
        image_key, caption_key: the columns of a table, as for `data.load.load_pairs`.

    Metadata files that may accompany the images are described by `data.clip_benchmark.DataSet`.
    """
    if not name:
        raise InputError("The name of a task is empty.", hint="check the variable it came from; . is this folder")
    if name in BUILT_IN_TASKS:
        from clip_rd_edge.data import emoji

        split: emoji.Split = "unseen style" if "unseen-style" in name else "unseen concepts"
        return emoji.retrieval_task(split) if name.endswith(":retrieval") else emoji.zero_shot_task(split)
    if names_shards(name):
        paths = [path for source in parse_sources(name) for path in source.shards]
        current_versions(paths)
        return retrieval_from_shards(shown_source(name), list(map(open_shard, paths)))
    path = Path(name)
    if is_file(path):
        return _from_table(read_table(path, image_key=image_key, caption_key=caption_key), path.stem)
    if not is_folder(path):
        raise InputError(
            f"No task named {quoted(shown_source(name))}: it is neither a folder of images nor one of "
            f"{', '.join(BUILT_IN_TASKS)}.{near_matches(name, BUILT_IN_TASKS) or near_files(path)}",
            hint="check the path: a task is a folder with one subfolder of images per class, or a table of captions",
        )
    data_set = find_data_set(path)
    return shard_task(data_set) if data_set.is_sharded else image_folder_task(data_set)


def _from_table(pairs: TablePairs, name: str) -> RetrievalTask:
    """Return the retrieval task of a table. No row is left out: that would change the evaluation."""
    if pairs.left_out:
        raise InputError(f"{pairs.left_out[0]}.", hint="fix or remove the row: a task is evaluated on all of its rows")
    paths = [path.resolve() for path in pairs.images]  # an image may have several paths
    images = list(dict.fromkeys(paths))
    index_of = {path: index for index, path in enumerate(images)}
    captions = [(caption, index_of[path]) for path, texts in zip(paths, pairs.texts, strict=True) for caption in texts]
    return RetrievalTask(
        name=name,
        images=tuple(images),
        captions=tuple(caption for caption, _ in captions),
        caption_images=tuple(index for _, index in captions),
    )
