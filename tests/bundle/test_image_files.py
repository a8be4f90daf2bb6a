"""Which files are images: in folders that cannot be read, behind links, and behind links that lead nowhere."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from PIL import Image
from support import fail_to_look_at

from clip_rd_edge.bundle.image_files import find_images, list_images
from clip_rd_edge.bundle.images import open_image
from clip_rd_edge.errors import InputError


def test_a_file_that_cannot_be_looked_at_is_an_image_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad sector, or a share that hesitates: the others of its folder are not lost."""
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path in paths:
        path.touch()
    fail_to_look_at(monkeypatch, lambda path: path == paths[1], OSError(errno.EIO, "Input/output error"))
    assert list_images(tmp_path) == paths
    assert list(find_images([str(tmp_path / "*.png")])) == paths
    with pytest.raises(InputError, match=r"Cannot read the image .*1\.png: Input/output error\."):
        open_image(paths[1])


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder with links to a folder and a file elsewhere, to nothing, and back to itself."""
    for name in ("real/1.png", "real/2.png", "links/frog/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    links = tmp_path / "links"
    (links / "cat").symlink_to(tmp_path / "real")
    (links / "frog" / "4.png").symlink_to(tmp_path / "real" / "1.png")
    (links / "frog" / "5.png").symlink_to(tmp_path / "gone.png")
    (links / "frog" / "back").symlink_to(links)
    (tmp_path / "real" / "round").symlink_to(links)
    return links


def test_links_are_followed_and_those_that_lead_back_end(linked: Path) -> None:
    listed = [path.relative_to(linked).as_posix() for path in list_images(linked)]
    assert listed == ["cat/1.png", "cat/2.png", "frog/3.png", "frog/4.png", "frog/5.png"]


def test_a_glob_of_any_depth_matches_the_images_of_the_folder_and_each_once(
    linked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(8):  # glob's own ** would look for 8 to the power of 40 folders
        (linked / "frog" / f"round-{number}").symlink_to(linked)
    (linked / "[a]").mkdir()
    (linked / "[a]" / "6.png").touch()
    for pattern in ("**/*.png", "**", "**/**/*"):
        assert list(find_images([str(linked.parent / "lin*" / pattern)])) == list_images(linked)
    assert list(find_images([str(linked / "[[]a]" / "**")])) == [linked / "[a]" / "6.png"]
    monkeypatch.chdir(linked)
    assert list(find_images(["**/5.png"])) == [Path("frog/5.png")]


@pytest.mark.parametrize("name", ["frog", "frog/5.png", "frog/*.png"])
def test_a_link_to_nothing_is_an_image_that_cannot_be_read(linked: Path, name: str) -> None:
    dead = linked / "frog" / "5.png"
    assert dead in find_images([str(linked / name)])
    with pytest.raises(InputError, match=r"5\.png: it is a link to something that does not exist\.$"):
        open_image(dead)


@pytest.mark.parametrize(("suffix", "kind"), [(".jfif", "JPEG"), (".PGM", "PPM"), (".HIF", "PNG")])
def test_images_under_the_less_usual_names_of_the_formats_that_are_read_are_found(
    tmp_path: Path, suffix: str, kind: str
) -> None:
    name = tmp_path / f"photo{suffix}"
    Image.new("RGB", (9, 9)).save(name, kind)
    (tmp_path / "notes.txt").touch()
    assert list_images(tmp_path) == [name]
    assert open_image(name).size == (9, 9)
