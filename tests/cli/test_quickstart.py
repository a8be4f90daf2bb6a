"""What the quickstart suggests at its end."""

from __future__ import annotations

import ntpath
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from clip_rd_edge.cli import quickstart, train
from clip_rd_edge.data.tasks import ZeroShotTask

ROOT = Path(__file__).parents[2]


def task(*names: str) -> ZeroShotTask:
    """Two images of each concept, as in the two art styles."""
    images = tuple(Path(f"/emoji of mine/{style}/{name}.png") for name in names for style in ("a", "b"))
    return ZeroShotTask(
        name="unseen", images=images, targets=tuple(i // 2 for i in range(2 * len(names))), labels=names
    )


def suggested_classification(monkeypatch: pytest.MonkeyPatch, concepts: ZeroShotTask) -> list[str]:
    monkeypatch.setattr(quickstart, "_unseen_concepts", lambda: concepts)
    shown = quickstart._next_steps(Path("my runs/quickstart")).replace("\\\n", " ")
    return shlex.split(next(line for line in shown.splitlines() if " classify " in line))


@pytest.mark.parametrize(
    "names", [("arrow", "square", "tiger", "circle", "mushroom", "rocket"), ("arrow", "square", "circle", "line", "x")]
)
def test_the_suggested_labels_differ_and_one_is_the_images(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    arguments = suggested_classification(monkeypatch, task(*names))
    split = arguments.index("--labels")
    image, labels = Path(arguments[split - 1]), arguments[split + 1 :]
    assert arguments[split - 2] == "my runs/quickstart/bundles/int8"
    assert len(labels) == len(set(labels)) >= 3
    assert image.stem in labels
    assert set(labels) <= set(names)


def test_lively_labels_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = suggested_classification(monkeypatch, task("arrow", "rocket", "square", "snowman", "tiger", "mushroom"))
    assert arguments[arguments.index("--labels") + 1 :] == list(quickstart.LIVELY_CONCEPTS)


def test_the_lively_labels_are_concepts_in_no_training_pair() -> None:
    emoji = pytest.importorskip("clip_rd_edge.data.emoji")
    pytest.importorskip("resvg_py")
    unseen = {concept.name for concept in emoji.concepts() if concept.split == "unseen concepts"}
    assert set(quickstart.LIVELY_CONCEPTS) <= unseen


def test_everybody_is_shown_the_same_first_command() -> None:
    def words(text: str) -> str:
        return re.sub(r"[\\\s]+", " ", text)

    example = words(f"clip-rd-edge {train.OWN_DATA_EXAMPLE}")
    help_text = train.distill.help or ""
    for text in (help_text, (ROOT / "README.md").read_text(), (ROOT / "docs/data.md").read_text()):
        assert example in words(text)


def test_the_program_is_named_as_it_can_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", [str(ROOT / "clip_rd_edge" / "__main__.py")])
    assert quickstart._program() == f"{shlex.quote(sys.executable)} -m clip_rd_edge"
    monkeypatch.setattr(sys, "argv", [str(Path.cwd() / ".venv/bin/clip-rd-edge")])
    assert quickstart._program() == ".venv/bin/clip-rd-edge"


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("cli.quickstart", "utils.text"):
        monkeypatch.setattr(f"clip_rd_edge.{module}.os", SimpleNamespace(name="nt", path=ntpath))


@pytest.mark.usefixtures("windows")
def test_a_program_on_another_drive_is_named_by_its_whole_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    program = r"Z:\of mine\.venv\Scripts\clip-rd-edge"
    monkeypatch.setattr(sys, "argv", [program])
    assert quickstart._program() == f'"{program}"'


@pytest.mark.usefixtures("windows")
def test_the_shells_of_windows_are_shown_each_command_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "_unseen_concepts", lambda: task("arrow", "rocket", "square", "circle"))
    lines = [line.strip() for line in quickstart._next_steps(Path("runs/quickstart")).splitlines()]
    (trained,) = (line for line in lines if " distill " in line)
    assert trained.split()[-10:] == re.sub(r"[\\\s]+", " ", train.OWN_DATA_EXAMPLE).split()[-10:]
    assert not any(line.startswith("-") or line.endswith("\\") for line in lines)
