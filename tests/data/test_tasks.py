"""Tasks: data set layouts of CLIP_benchmark and torchvision, tables and shards, and names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_rd_edge.bundle.image_files import list_images
from clip_rd_edge.bundle.images import open_image
from clip_rd_edge.data.tasks import RetrievalTask, ZeroShotTask, load_task, with_distinct_names
from clip_rd_edge.errors import InputError

Factory = Callable[..., Any]


@pytest.fixture
def image_folders(tmp_path: Path, encode_image: Factory) -> Path:
    """DATASET/test/CLASS/image, with class names and templates at the root, and a training split to be ignored."""
    root = tmp_path / "wds_vtab-things"
    for split, classes in (("train", ("n1",)), ("test", ("n1", "n2"))):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            (root / split / name / "1.png").write_bytes(encode_image(3))
    (root / "classnames.txt").write_text("a cat\na dog\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of {c}.\na drawing of {c}.\n")
    return root


@pytest.fixture
def classification_shards(tmp_path: Path, write_tar: Factory, encode_image: Factory) -> Path:
    """CLIP_benchmark's export of a classification data set: five images of three classes in two shards."""
    root = tmp_path / "wds_imagenet1k"
    for shard, numbers in enumerate([(0, 1, 2), (3, 4)]):
        members = {}
        for i in numbers:
            members |= {f"s{i:07d}.cls": str(i % 3).encode(), f"s{i:07d}.webp": encode_image(i, "webp")}
        write_tar(root / "test" / f"{shard}.tar", members)
    (root / "test" / "nshards.txt").write_text("2\n")
    (root / "classnames.txt").write_text("fish\nbird\nfrog\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    return root


@pytest.fixture
def retrieval_shards(tmp_path: Path, write_tar: Factory, encode_image: Factory) -> Path:
    """CLIP_benchmark's export of a retrieval data set: two images with five captions each."""
    root = tmp_path / "wds_flickr30k"
    members = {}
    for i in range(2):
        captions = "\n".join(f"caption {j} of {i}" for j in range(5))
        members |= {f"s{i:07d}.jpg": encode_image(i, "jpeg"), f"s{i:07d}.txt": captions.encode()}
    write_tar(root / "test" / "0.tar", members)
    (root / "test" / "nshards.txt").write_text("1\n")
    (root / "dataset_type.txt").write_text("retrieval\n")
    return root


def zero_shot(path: Path) -> ZeroShotTask:
    task = load_task(str(path))
    assert isinstance(task, ZeroShotTask)
    return task


def test_an_image_folder_with_splits(image_folders: Path) -> None:
    task = zero_shot(image_folders)
    assert [str(image).removeprefix(f"{image_folders}/") for image in task.images] == ["test/n1/1.png", "test/n2/1.png"]
    assert (task.name, task.labels, task.templates_from) == ("things", ("a cat", "a dog"), "the data set's")
    assert task.folders == ("n1", "n2")
    assert task.templates == ("a photo of {c}.", "a drawing of {c}.")
    assert zero_shot(image_folders / "test") == task  # its metadata are in the parent folder


@pytest.fixture
def make(tmp_path: Path, encode_image: Factory) -> Callable[..., Path]:
    """Write images under these names, and return their folder."""

    def write(*names: str) -> Path:
        for number, name in enumerate(names):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(encode_image(number))
        return tmp_path

    return write


def test_a_class_may_be_called_test_or_train(make: Callable[..., Path]) -> None:
    assert zero_shot(make("exam/1.png", "test/1.png", "train/1.png")).labels == ("exam", "test", "train")


def test_what_other_programs_put_beside_the_images_is_neither_a_class_nor_an_image(make: Callable[..., Path]) -> None:
    folder = make(
        "cat/1.png", "cat/._1.png", "cat/.ipynb_checkpoints/1-checkpoint.png", "cat/@eaDir/1.png/SYNOPHOTO_M.png",
        "test/2.png", "test/.thumbnails/2.png", "__MACOSX/cat/._1.png", "@eaDir/cat/1.png", ".git/3.png",
    )  # fmt: skip
    task = zero_shot(folder)
    assert task.labels == ("cat", "test")
    assert list(task.images) == list_images(folder) == [folder / "cat/1.png", folder / "test/2.png"]


def test_an_exported_classification_data_set(classification_shards: Path) -> None:
    task = zero_shot(classification_shards)
    assert (task.name, task.labels, task.targets) == ("imagenet1k", ("fish", "bird", "frog"), (0, 1, 2, 0, 1))
    assert [open_image(image).getpixel((0, 0)) for image in task.images] == [(i, i, i) for i in range(5)]
    assert zero_shot(classification_shards / "test") == task


@pytest.mark.parametrize(("name", "content"), [("classnames.txt", "fish\nbird\n"), ("test/nshards.txt", "3")])
def test_invalid_metadata_are_refused(classification_shards: Path, name: str, content: str) -> None:
    (classification_shards / name).write_text(content)
    with pytest.raises(InputError):
        load_task(str(classification_shards))


def test_an_evaluation_skips_no_samples(classification_shards: Path, write_tar: Factory, encode_image: Factory) -> None:
    write_tar(
        classification_shards / "test" / "1.tar", {"s3.cls": b"0", "s3.webp": encode_image(0, "webp"), "s4.cls": b"1"}
    )
    with pytest.raises(InputError, match=r"1\.tar: s4 has no image"):
        load_task(str(classification_shards))


def test_an_exported_retrieval_data_set(retrieval_shards: Path) -> None:
    task = load_task(str(retrieval_shards))
    assert isinstance(task, RetrievalTask)
    assert (task.name, len(task.images)) == ("flickr30k", 2)
    assert task.captions[4:6] == ("caption 4 of 0", "caption 0 of 1")
    assert task.caption_images == (0,) * 5 + (1,) * 5
    assert [open_image(image).size for image in task.images] == [(24, 20)] * 2


def test_captioned_shards_without_metadata_are_retrieval(retrieval_shards: Path) -> None:
    (retrieval_shards / "dataset_type.txt").unlink()
    (retrieval_shards / "test" / "nshards.txt").unlink()
    (retrieval_shards / "test" / "0.tar").rename(retrieval_shards / "00000.tar")
    by_folder, by_pattern = load_task(str(retrieval_shards)), load_task(str(retrieval_shards / "{00000..00000}.tar"))
    assert isinstance(by_folder, RetrievalTask)
    assert isinstance(by_pattern, RetrievalTask)
    assert len(by_folder.captions) == 10
    assert by_folder.images == by_pattern.images


def test_what_names_no_images_or_a_row_that_is_no_pair_is_refused(image_folders: Path, tmp_path: Path) -> None:
    table = image_folders / "pairs.csv"
    table.write_text("filepath,title\ntest/n1/1.png,a cat\ntest/n1/2.png,a cat\n")
    (tmp_path / "empty").mkdir()
    for name in (str(table), "emoji:unseen-stile", str(tmp_path / "empty"), ""):
        with pytest.raises(InputError):
            load_task(name)


def names(*tasks: tuple[str, str]) -> list[str]:
    made = [RetrievalTask(name=name, images=(), captions=(), caption_images=()) for name, _ in tasks]
    return [task.name for task in with_distinct_names(made, [source for _, source in tasks])]


def test_tasks_of_one_file_name_are_named_by_the_parts_of_their_paths_that_differ_and_others_stay() -> None:
    three = names(("val", "/data/a/val.csv"), ("val", "/data/b/val.csv"), ("test", "/data/a/test.csv"))
    assert three == ["a/val.csv", "b/val.csv", "test"]
    assert names(("val", "val.csv"), ("val", "val.tsv")) == ["val.csv", "val.tsv"]
    assert names(("val", "/x/val.csv"), ("val", "y/val.csv")) == ["/x/val.csv", "y/val.csv"]
    assert names(("a", "x/a.csv"), ("b", "x/b.csv")) == ["a", "b"]
    assert names(("emoji:unseen-style", "emoji:unseen-style")) == ["emoji:unseen-style"]
