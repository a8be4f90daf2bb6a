"""Names that no file can have, wherever a command takes a path: each gets a sentence, and nothing is written."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]
NAMES = {"too long": "a" * 5000, "too deep": "a/" * 2500 + "x", "empty": ""}
# PATH stands for such a name.
COMMANDS = [
    "classify PATH P --labels red green",
    "classify B PATH --labels red green",
    "classify B P --labels red green --template PATH",
    "verify PATH",
    "index PATH photos -o i",
    "index B PATH -o i",
    "index B photos -o PATH",
    "search PATH red",
    "search B red --bundle PATH",
    "search B red --folder PATH",
    "quickstart -o o --photos PATH",
    "serve PATH",
    "serve B PATH",
    "serve B --token-file PATH",
    "demo PATH",
    "evaluate PATH --task tasks",
    "evaluate B --task PATH",
    "evaluate B --task tasks --template PATH",
    "export PATH -o o",
    "export B -o PATH",
    "export B -o o --target browser --node-modules PATH",
    "export student -o o --precision int8 --calibration PATH",
    "recipe show PATH.yaml",
    "benchmark PATH -o o",
    "benchmark quickstart -o PATH",
    "benchmark quickstart -o o --model student=PATH",
    "benchmark --compare PATH PATH",
    "evidence report PATH PATH",
    "evidence run PATH -o o",
    "evidence report PATH",
    "distill --data PATH --student resnet18 --recipe clip -o o",
    "distill --data PATH.tar --student resnet18 --recipe clip -o o",
    "distill --images PATH --texts labels.txt --student resnet18 --recipe clip -o o",
    "distill --images photos --texts PATH --student resnet18 --recipe clip -o o",
    "distill --images photos --texts labels.txt --template PATH --student resnet18 --recipe clip -o o",
    "distill --data pairs.csv --student PATH.json --recipe clip -o o",
    "distill --data pairs.csv --student resnet18 --teacher PATH -o o",
    "distill --data pairs.csv --student resnet18 --recipe clip -o PATH",
    "distill --data pairs.csv --student resnet18 --recipe PATH.yaml -o o",
    "distill --data pairs.csv --student resnet18 --recipe clip --task PATH -o o",
    "average PATH photos -o o",
    "average photos PATH -o o",
    "average photos photos -o PATH",
    "average photos photos --task PATH -o o",
    "stitch resnet18 --names PATH --text all-MiniLM-L6-v2 -o o",
    "stitch resnet18 --names labels.txt --text all-MiniLM-L6-v2 -o PATH",
    "trim photos --text-layers 1 -o PATH",
    "trim photos --vocabulary 9 --texts PATH -o o",
    "quickstart -o PATH",
]


@pytest.fixture
def place(colour_bundle: Path, colour_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a bundle B, an image P, a folder of photos, a task and pairs."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(colour_bundle, "B")
    shutil.copy(colour_images / "red.png", "P")
    for colour in ("red", "green"):
        (tmp_path / "tasks" / colour).mkdir(parents=True)
        shutil.copy(colour_images / f"{colour}.png", tmp_path / "tasks" / colour)
    (tmp_path / "labels.txt").write_text("red\ngreen\n")
    (tmp_path / "pairs.csv").write_text("filepath,title\nphotos/red.png,red\nphotos/green.png,green\n")
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_no_file_can_have_gets_a_sentence(place: Path, command_line: Run, command: str, name: str) -> None:
    before = sorted(place.rglob("*"))
    code, output, error = command_line(*(word.replace("PATH", NAMES[name]) for word in shlex.split(command)))
    assert (code, output) == (2, "")
    (sentence,) = (line for line in error.splitlines() if line.startswith("error: "))
    assert "Error:" not in sentence
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    "command",
    [
        "distill --data pairs.csv --student resnet18 --recipe clip -o PATH",
        "stitch resnet18 --names labels.txt --text all-MiniLM-L6-v2 -o PATH",
        "quickstart -o PATH",
        "evidence run method-evidence -o PATH",
    ],
)
def test_a_model_is_written_only_where_its_weights_can_be_read(place: Path, command_line: Run, command: str) -> None:
    name = os.fsdecode(b"caf\xe9/run")
    before = sorted(place.rglob("*"))
    code, output, error = command_line(*(word.replace("PATH", name) for word in shlex.split(command)))
    assert (code, output) == (2, "")
    assert "error: The output caf\\xe9/run cannot be written: its path is not UTF-8" in error
    assert "hint: choose another --output" in error
    assert sorted(place.rglob("*")) == before
