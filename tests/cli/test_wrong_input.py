"""Kinds of wrong input to every command: each gets a sentence and a hint, and who follows the hint succeeds.

Every error of the package is checked for its form in tests/test_errors.py; these are seen through the command line.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import click
import pytest
from PIL import Image
from support import CommandLine, assert_form

from clip_rd_edge.cli.main import cli
from clip_rd_edge.models.clip import ClipModel

LABELS = "--labels red green"
TINY = "--text 64x1 --image-size 32 --context-length 8 --embedding-size 16 --batch-size 6 --precision fp32 --workers 0"
DISTILL = f"distill --student test_resnet --recipe clip {TINY} --steps 1"
DISTIL_TWO = f"{DISTILL} --data two.csv -o o"
EXPORT_RUN = f"export run -o o {LABELS}"
# The command, and the command after following the hint: empty where the hint itself holds a command, `clip-rd-edge …
# --help` or another that runs anywhere, or an example that must at least be a valid command.
CASES = [
    ("classifi B P", f"classify B P {LABELS}"),
    ("classify", ""),
    ("classify B --labels labels.txt", "classify B P --labels labels.txt"),
    ("classify B P --lables red", f"classify B P {LABELS}"),
    ("classify B P --labels labelz.txt", "classify B P --labels labels.txt"),
    ("classify B P", f"classify B P {LABELS}"),
    (f"classify B P {LABELS} --top 0", ""),
    (f"classify B photos/rde.png {LABELS}", f"classify B photos/red.png {LABELS}"),
    (f"classify P B {LABELS}", f"classify B P {LABELS}"),
    ("verify nothing", "verify B"),
    ("index B photo -o i", "index B photos -o i"),
    ("search I", ""),
    ("search I missing.png", "search I 'a red image'"),
    ("evaluate B", ""),
    ("evaluate B --task taskz", "evaluate B --task tasks"),
    ("evaluate B --task columns.csv", "evaluate B --task columns.csv --csv-img-key image --csv-caption-key caption"),
    ("average run nothing -o o", "average run run -o a"),
    ("export B -o o", EXPORT_RUN),
    ("export unfinished -o o --precision int8", None),
    ("export run -o photos", None),
    ("export run -o o --target jetson", ""),
    ("export run -o o --precision float16", ""),
    ("export run -o o --precision int8 --calibration two.csv", None),
    ("export open_clip:ViT-B-32 -o o", None),
    ("export B -o o --target browser --node-modules nowhere", None),
    (f"{DISTILL} -o o", None),
    (f"{DISTILL} --data tow.csv -o o", DISTIL_TWO),
    (f"{DISTILL} --data two.csv --recipe clip-rd -o o", None),
    (f"{DISTILL} --data columns.csv -o o",
     f"{DISTILL} --data columns.csv -o o --csv-img-key image --csv-caption-key caption"),
    (f"{DISTILL} --data two.csv --pretrained-image P -o o", None),
    ("recipe shw", "recipe"),
    ("benchmark nothing -o o", "benchmark --init"),
    ("targets cpu-x68", "targets cpu-x86"),
    ("quickstart --student resnet81 -o o", None),
    ("demo nothing", None),
    ("serve B --token-file empty.txt", None),
]  # fmt: skip


@pytest.fixture(scope="session")
def trained(student: ClipModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run, but with the student of all tests, whose export takes no time."""
    import clip_rd_edge as edge
    from clip_rd_edge.models.load import save_clip

    folder = tmp_path_factory.mktemp("trained")
    for name in ("red", "green"):
        Image.new("RGB", (40, 30), name).save(folder / f"{name}.png")
    (folder / "pairs.csv").write_text("filepath,title\n" + "red.png,red\ngreen.png,green\n" * 3)
    edge.distill(
        data=folder / "pairs.csv", student="test_resnet", recipe="clip", output=folder / "run", text="tiny",
        image_size=32, context_length=8, embedding_size=16, batch_size=6, precision="fp32", workers=0, steps=1,
    )  # fmt: skip
    record = json.loads((folder / "run" / "student" / "distillation.json").read_text())
    save_clip(folder / "run" / "student", student, provenance=record, overwrite=True)
    return folder / "run"


@pytest.fixture
def place(
    colour_bundle: Path, colour_images: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A working folder with a bundle B, an image P, a folder of photos, a run and faulty files."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(colour_bundle, "B")
    shutil.copytree(trained, "run", copy_function=os.link)  # which has large weights
    shutil.copy(colour_images / "red.png", "P")
    pairs = "photos/red.png,red\nphotos/green.png,green\n" * 3
    files = {
        "broken.png": "no image", "empty.txt": "", "labels.txt": "red\ngreen\n", "broken.yaml": "rows: [",
        "one.csv": "filepath,title\nphotos/red.png,red\n",
        "two.csv": f"filepath,title\n{pairs}", "columns.csv": f"image,caption\n{pairs}",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished").mkdir()
    shutil.copy("run/config.yaml", "unfinished")
    for colour in ("red", "green"):
        (tmp_path / "tasks" / colour).mkdir(parents=True)
        shutil.copy(colour_images / f"{colour}.png", tmp_path / "tasks" / colour)
    return tmp_path


_followed = set[str]()  # what has succeeded: the place of each test is the same


@pytest.mark.parametrize(("command", "mended"), CASES, ids=[case[0] for case in CASES])
def test_wrong_input_gets_a_sentence_and_a_hint_that_helps(
    place: Path, command_line: CommandLine, command: str, mended: str | None
) -> None:
    if " I " in f"{command} {mended or ''} ":
        assert command_line("index", "B", "photos", "-o", "I")[0] == 0
    before = sorted(place.rglob("*"))
    code, output, error = command_line(*shlex.split(command))
    assert (code, output) == (2, "")
    shown = dict(line.split(": ", 1) for line in error.strip().splitlines() if not line.startswith("·"))
    assert list(shown) == ["error", "hint"] or (list(shown) == ["error"] and mended is None)
    sentence, hint = shown["error"], shown.get("hint", "")
    if not sentence.startswith("Got unexpected"):  # a sentence of click's
        assert_form(sentence, hint)
    assert len(error.strip().splitlines()) <= 3  # with the line that a long command starts with
    assert [path for path in sorted(place.rglob("*")) if path not in before and path.name not in ("I", "i")] == []
    if mended and mended not in _followed:
        assert command_line(*shlex.split(mended))[0] == 0
        _followed.add(mended)
    elif mended == "":
        follow(hint, command_line)


def follow(hint: str, command_line: CommandLine) -> None:
    """Run the command in a hint, or parse it where it is an example with names of its own."""
    found = re.search(r"clip-rd-edge ((?:[a-z]+ )+--help|targets)", hint)
    if found:
        assert command_line(*shlex.split(found[1]))[0] == 0
        return
    arguments = shlex.split(hint[hint.index("clip-rd-edge ") :])[1:]
    name, command, rest = cli.resolve_command(click.Context(cli), arguments)
    assert command is not None
    command.make_context(name, list(rest))


# PATH stands for a name that no file can have.
NAMES = {"too long": "a" * 5000, "too deep": "a/" * 2500 + "x", "empty": ""}
PATHS = [
    "classify PATH P --labels red green",
    "classify B PATH --labels red green",
    "classify B P --labels red green --template PATH",
    "index B PATH -o i",
    "index B photos -o PATH",
    "search PATH red",
    "quickstart -o o --photos PATH",
    "serve B --token-file PATH",
    "evaluate B --task PATH",
    "export PATH -o o",
    "export B -o PATH",
    "export B -o o --target browser --node-modules PATH",
    "export student -o o --precision int8 --calibration PATH",
    "recipe PATH.yaml",
    "benchmark PATH -o o",
    "benchmark --compare PATH PATH",
    "evidence run PATH -o o",
    "distill --data PATH --student resnet18 --recipe clip -o o",
    "distill --images photos --texts PATH --student resnet18 --recipe clip -o o",
    "distill --data two.csv --student resnet18 --teacher PATH -o o",
    "distill --data two.csv --student resnet18 --recipe clip -o PATH",
    "average photos PATH -o o",
    "stitch resnet18 --names PATH --text all-MiniLM-L6-v2 -o o",
    "trim photos --vocabulary 9 --texts PATH -o o",
]


@pytest.mark.parametrize("command", PATHS)
def test_a_name_that_no_file_can_have_gets_a_sentence(place: Path, command_line: CommandLine, command: str) -> None:
    before = sorted(place.rglob("*"))
    for name in NAMES.values():
        code, output, error = command_line(*(word.replace("PATH", name) for word in shlex.split(command)))
        assert (code, output) == (2, "")
        (sentence,) = (line for line in error.splitlines() if line.startswith("error: "))
        assert "Error:" not in sentence
        assert sorted(place.rglob("*")) == before


def test_a_model_is_written_only_where_its_weights_can_be(place: Path, command_line: CommandLine) -> None:
    before, run = sorted(place.rglob("*")), os.fsdecode(b"caf\xe9/run")
    code, output, error = command_line(
        *["distill", "--data", "two.csv", "--student", "resnet18", "--recipe", "clip", "-o"], run
    )
    assert (code, output) == (2, "")
    assert "caf\\xe9/run" in error
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("classify B broken.png P --labels red green", 2),
        ("verify damaged", 1),
    ],
)
def test_a_failure_has_its_exit_code_with_json_too(
    place: Path, command_line: CommandLine, command: str, code: int
) -> None:
    """And stdout holds JSON or nothing."""

    shutil.copytree("B", "damaged")
    (place / "damaged" / "image.onnx").write_bytes(b"damaged")
    words = shlex.split(command)
    assert command_line(*words)[0] == code
    json_code, output, _ = command_line(*words, "--json")
    assert json_code == code
    for line in output.splitlines():
        json.loads(line)
