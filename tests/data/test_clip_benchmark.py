"""Every layout that CLIP_benchmark and torchvision leave behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_rd_edge.contract.images import open_image
from clip_rd_edge.contract.task import RetrievalTask, ZeroShotTask
from clip_rd_edge.data.clip_benchmark import Templates
from clip_rd_edge.data.tasks import load_task
from clip_rd_edge.errors import InputError

Make = Callable[..., Any]


@pytest.fixture
def folders(tmp_path: Path, picture: Make) -> Path:
    """DATASET/test/CLASS/picture, with names and templates at the root, and a training split to be left alone."""
    root = tmp_path / "wds_vtab-things"
    for split, classes in (("train", ("n1",)), ("test", ("n1", "n2"))):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            (root / split / name / "1.png").write_bytes(picture(3))
    (root / "classnames.txt").write_text("a cat\na dog\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of {c}.\na drawing of {c}.\n")
    return root


@pytest.fixture
def classified(tmp_path: Path, write_tar: Make, picture: Make) -> Path:
    """CLIP_benchmark's export of a classification data set: five pictures of three classes in two shards."""
    root = tmp_path / "wds_imagenet1k"
    for shard, numbers in enumerate([(0, 1, 2), (3, 4)]):
        members = {}
        for i in numbers:
            members |= {f"s{i:07d}.cls": str(i % 3).encode(), f"s{i:07d}.webp": picture(i, "webp")}
        write_tar(root / "test" / f"{shard}.tar", members)
    (root / "test" / "nshards.txt").write_text("2\n")
    (root / "classnames.txt").write_text("fish\nbird\nfrog\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    return root


@pytest.fixture
def captioned(tmp_path: Path, write_tar: Make, picture: Make) -> Path:
    """CLIP_benchmark's export of a retrieval data set: two pictures with five captions each."""
    root = tmp_path / "wds_flickr30k"
    members = {}
    for i in range(2):
        captions = "\n".join(f"caption {j} of {i}" for j in range(5))
        members |= {f"s{i:07d}.jpg": picture(i, "jpeg"), f"s{i:07d}.txt": captions.encode()}
    write_tar(root / "test" / "0.tar", members)
    (root / "test" / "nshards.txt").write_text("1\n")
    (root / "dataset_type.txt").write_text("retrieval\n")
    return root


def zero_shot(path: Path, **options: Any) -> ZeroShotTask:
    task = load_task(str(path), **options)
    assert isinstance(task, ZeroShotTask)
    return task


def test_a_folder_of_splits(folders: Path) -> None:
    task = zero_shot(folders)
    assert [str(image).removeprefix(f"{folders}/") for image in task.images] == ["test/n1/1.png", "test/n2/1.png"]
    assert (task.name, task.labels, task.templates_from) == ("things", ("a cat", "a dog"), "the data set's")
    assert task.templates == ("a photo of {c}.", "a drawing of {c}.")
    assert zero_shot(folders / "test") == task  # what is said of it lies one above


def test_torchvisions_imagenet(tmp_path: Path, picture: Make) -> None:
    for name in ("n01443537", "n01440764"):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "1.png").write_bytes(picture(1))
    with pytest.raises(InputError, match="named by WordNet ids, such as n01440764") as caught:
        load_task(str(tmp_path))
    assert str(tmp_path / "classnames.txt") in caught.value.hint
    (tmp_path / "val" / "classnames.txt").write_text("tench\ngoldfish\n")  # beside the pictures does as well
    task = zero_shot(tmp_path)
    assert task.labels == ("tench", "goldfish")
    assert [Path(str(image)).parent.name for image in task.images] == ["n01440764", "n01443537"]


def test_folders_that_are_numbers_are_in_their_order(tmp_path: Path, picture: Make) -> None:
    for number in (0, 1, 2, 10):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "1.png").write_bytes(picture(number))
    (tmp_path / "classnames.txt").write_text("zero\none\ntwo\nten\n")
    task = zero_shot(tmp_path)
    shown = [open_image(image).getpixel((0, 0))[0] for image in task.images]  # type: ignore[index]
    assert [(task.labels[t], grey) for t, grey in zip(task.targets, shown, strict=True)] == [
        ("zero", 0), ("one", 1), ("two", 2), ("ten", 10),
    ]  # fmt: skip


def test_a_class_called_test_is_no_split(tmp_path: Path, picture: Make) -> None:
    for name in ("exam", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(picture(1))
    assert zero_shot(tmp_path).labels == ("exam", "test")


def test_templates_are_asked_for_only_where_there_are_none(folders: Path, tmp_path: Path) -> None:
    def never() -> Templates:
        raise AssertionError("the data set has its own")

    assert zero_shot(folders, fallback=never).templates_from == "the data set's"
    (folders / "zeroshot_classification_templates.txt").unlink()
    given = zero_shot(folders, fallback=lambda: Templates(("a {}", "the {}"), "mine"))
    assert (given.templates, given.templates_from) == (("a {}", "the {}"), "mine")
    assert zero_shot(folders).templates == ("a photo of a {}.",)


def test_an_exported_classification_data_set(classified: Path) -> None:
    task = zero_shot(classified)
    assert (task.name, task.labels, task.targets) == ("imagenet1k", ("fish", "bird", "frog"), (0, 1, 2, 0, 1))
    assert [open_image(image).getpixel((0, 0)) for image in task.images] == [(i, i, i) for i in range(5)]
    assert zero_shot(classified / "test") == task


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("classnames.txt", "fish\nbird\n", r"0\.tar: s0000002\.cls says '2'; expected a number below 2"),
        ("classnames.txt", "", "has no classnames.txt, which says what"),
        ("classnames.txt", "fish\n\nfrog\n", r"classnames\.txt, line 2, is empty"),
        ("test/nshards.txt", "3", r"Cannot read the shard .*2\.tar"),
        ("test/nshards.txt", "many", "says 'many'; expected the number of shards"),
        ("dataset_type.txt", "multilabel", "is of the type 'multilabel'"),
    ],
)
def test_what_does_not_fit_is_named(classified: Path, name: str, content: str, message: str) -> None:
    (classified / name).write_text(content)
    with pytest.raises(InputError, match=message):
        load_task(str(classified))


def test_an_evaluation_passes_nothing_over(classified: Path, write_tar: Make, picture: Make) -> None:
    write_tar(classified / "test" / "1.tar", {"s3.cls": b"0", "s3.webp": picture(0, "webp"), "s4.cls": b"1"})
    with pytest.raises(InputError, match=r"1\.tar: s4 has no picture"):
        load_task(str(classified))


def test_an_exported_retrieval_data_set(captioned: Path) -> None:
    task = load_task(str(captioned))
    assert isinstance(task, RetrievalTask)
    assert (task.name, len(task.images)) == ("flickr30k", 2)
    assert task.captions[4:6] == ("caption 4 of 0", "caption 0 of 1")
    assert task.caption_images == (0,) * 5 + (1,) * 5
    assert [open_image(image).size for image in task.images] == [(24, 20)] * 2


def test_captioned_shards_without_any_note_are_retrieval(captioned: Path) -> None:
    (captioned / "dataset_type.txt").unlink()
    (captioned / "test" / "nshards.txt").unlink()
    (captioned / "test" / "0.tar").rename(captioned / "00000.tar")
    task, by_pattern = load_task(str(captioned)), load_task(str(captioned / "{00000..00000}.tar"))
    assert isinstance(task, RetrievalTask)
    assert isinstance(by_pattern, RetrievalTask)
    assert len(task.captions) == 10
    assert task.images == by_pattern.images


def test_a_table_is_retrieval_with_all_captions_of_a_picture(pairs_csv: Path) -> None:
    with pairs_csv.open("a") as file:
        file.write("pictures/3.png,another caption of 3\n")
    task = load_task(str(pairs_csv))
    assert isinstance(task, RetrievalTask)
    assert (len(task.images), len(task.captions)) == (24, 25)
    assert (task.captions[24], task.caption_images[24]) == ("another caption of 3", 3)
