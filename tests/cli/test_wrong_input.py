"""Kinds of wrong input to every command: each gets a sentence and a hint, and who follows the hint succeeds."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from PIL import Image

from clip_rd_edge.cli.main import cli

Run = Callable[..., tuple[int, str, str]]
LABELS = "--labels red green"
TINY = "--text 64x1 --image-size 32 --context-length 8 --embedding-size 16 --batch-size 6 --precision fp32 --workers 0"
DISTILL = f"distill --student test_resnet --recipe clip {TINY} --steps 1"
DISTIL_TWO = f"{DISTILL} --data two.csv -o o"
EMBED_TWO = "embed --data two.csv --teacher run -o o"
EXPORT_RUN = f"export run -o o {LABELS}"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "xeon-amx-2-cores" / "quickstart.json"
# The command, a part of the message, and the command after following the hint; without one, the hint itself holds a
# command: `clip-rd-edge … --help` or another that runs anywhere, or an example that must at least be a valid command.
CASES = [
    ("classifi B P", "Did you mean 'classify'", f"classify B P {LABELS}"),
    ("--verison", "Did you mean '--version'", "--version"),
    ("classify", "Missing argument 'BUNDLE'", ""),
    ("classify B", "Expected either images or --camera", f"classify B photos {LABELS}"),
    (f"classify B {LABELS} P", "--labels took P, as it takes", f"classify B P {LABELS}"),
    (f"classify B {LABELS} photos", "--labels took photos, as it takes", f"classify B photos {LABELS}"),
    ("classify B --labels labels.txt", "Expected either images or --camera", "classify B P --labels labels.txt"),
    (f"classify B P --camera 0 {LABELS}", "Expected either images or --camera", f"classify B P {LABELS}"),
    ("classify B P --lables red", "Did you mean '--labels'", f"classify B P {LABELS}"),
    ("classify B P --labels labelz.txt", "there is no such file", "classify B P --labels labels.txt"),
    ("classify B P --labels red,green", "looks like a list", f"classify B P {LABELS}"),
    ("classify B P --labels empty.txt", "has no labels", f"classify B P {LABELS}"),
    ("classify B P", "No labels were given, and the bundle has none", f"classify B P {LABELS}"),
    (f"classify B P {LABELS} --top 0", "0 is not in the range", ""),
    (f"classify B P {LABELS} --top three", "'three' is not a valid integer", ""),
    (f"classify B P {LABELS} --none-below 1.5", "1.5 is not in the range", ""),
    (f"classify B P {LABELS} --threads 0", "0 is not in the range", ""),
    (f"classify B P {LABELS} --device gpu", "Did you mean 'cuda'", f"classify B P {LABELS} --device cpu"),
    (f"classify B P {LABELS} --json --csv", "cannot be combined", f"classify B P {LABELS} --json"),
    (f"classify B P {LABELS} --template red", "has no {}", f"classify B P {LABELS} --template 'red {{}}'"),
    (f"classify B missing.png {LABELS}", "missing.png does not exist", f"classify B P {LABELS}"),
    (f"classify B empty {LABELS}", "The folder empty has no images", f"classify B photos {LABELS}"),
    (f"classify B '*.gif' {LABELS}", "No image matches *.gif", f"classify B 'photos/*.png' {LABELS}"),
    (f"classify B broken.png {LABELS}", "Cannot read the image broken.png", f"classify B P {LABELS}"),
    (f"classify nothing P {LABELS}", "it does not exist", f"classify B P {LABELS}"),
    (f"classify empty P {LABELS}", "it has no manifest.json", f"classify B P {LABELS}"),
    (f"classify P B {LABELS}", "is not a bundle: it is a file|has no images", f"classify B P {LABELS}"),
    ("verify", "Missing argument 'BUNDLE'", ""),
    ("verify nothing", "it does not exist", "verify B"),
    ("verify P", "it is a file", "verify B"),
    ("verify B --device cpuu", "Did you mean 'cpu'", "verify B --device CPU"),
    ("index B photos -o i --watch --ray auto", "cannot be combined", "index B photos -o i"),
    ("index B photos", "Missing option '-o'", ""),
    ("index B nothing -o i", "The folder nothing does not exist", "index B photos -o i"),
    ("index B P -o i", "The folder P is a file", "index B photos -o i"),
    ("index B empty -o i", "has no images", "index B photos -o i"),
    ("search I", "Missing argument 'QUERY'", ""),
    ("search nothing red", "is not an index", "search I red"),
    ("search B red", "is not an index", "search I red"),
    ("search I missing.png", "looks like the path of an image", "search I 'a red image'"),
    ("search I red --top 0", "0 is not in the range", ""),
    ("evaluate B", "Missing option '--task'", ""),
    ("evaluate B --task nothing", "No task named 'nothing'", "evaluate B --task tasks"),
    ("evaluate B --task emoji:unseen-styel", "Did you mean 'emoji:unseen-style'", "evaluate B --task tasks"),
    ("evaluate B --task empty", "has no images in subfolders", "evaluate B --task tasks"),
    ("evaluate B --task columns.csv", "columns.csv has no column 'filepath'",
     "evaluate B --task columns.csv --csv-img-key image --csv-caption-key caption"),
    ("evaluate B --task tasks --template red", "has no {}", "evaluate B --task tasks --template 'red {}'"),
    ("evaluate unfinished --task tasks", "has no student yet", "evaluate run --task tasks"),
    ("evaluate nothing --task tasks", "No model named 'nothing'", "evaluate B --task tasks"),
    ("average run", "Missing argument 'SECOND'", ""),
    ("average run nothing -o o", "No model named 'nothing'", "average run run -o a"),
    ("average run run -o run", "already exists and is not empty", None),
    ("average run run -o run --force", "The output run contains run/student, which it would replace", None),
    ("average run run -o photos --force", "The output photos is not replaced: it is no earlier average", None),
    ("stitch resnet18 --names imagenet --text x -o photos --force", "The output photos is not replaced", None),
    ("export run -o photos --force", "The output photos is not replaced: it is no earlier export", EXPORT_RUN),
    ("average run run -o o --weight best", "there is no task to measure it on", "average run run -o a --weight 0.5"),
    ("average run run -o o --weight 2", "2 is not in the range 0 to 1", ""),
    ("export B", "Missing option '-o'", ""),
    ("export B -o o", "is already a bundle", EXPORT_RUN),
    ("export nothing -o o", "No model named 'nothing'", EXPORT_RUN),
    ("export unfinished -o o", "The run unfinished has no student yet", EXPORT_RUN),
    ("export unfinished -o o --precision int8", "The run unfinished has no student yet", EXPORT_RUN),
    ("export photos -o o", "The folder photos holds no model", EXPORT_RUN),
    ("export run -o photos", "already exists and is not empty", EXPORT_RUN),
    ("export run -o o --target jetson", "Did you mean 'jetson-orin' or 'jetson-thor'", ""),
    ("export run -o o --precision int4", "'int4' is not one of", ""),
    ("export run -o o --precision float16", "Did you mean 'fp16'", ""),
    ("export run -o o --precision itn8", "Did you mean 'int8'", ""),
    ("export run -o o --format tensorrt", "Did you mean 'trt'", ""),
    ("export run -o o --layout hugging-face", "Did you mean 'huggingface'", ""),
    ("export run -o o --fallback fp-32", "Did you mean 'fp32'", ""),
    ("distill --data one.csv --student resnet18 -o o --precision half", "Did you mean 'fp16'", ""),
    ("distill --data one.csv --student resnet18 -o o --report-to tensorbord", "Did you mean 'tensorboard'", ""),
    ("embed", "Missing option '--teacher'", ""),
    ("embed --data two.csv --teacher nothing -o o", "No model named 'nothing'", EMBED_TWO),
    ("embed --data no.csv --teacher run -o o", "does not exist", EMBED_TWO),
    ("embed --data one.csv --teacher run -o o", "one.csv has 1 pair", EMBED_TWO),
    ("embed --data two.csv --teacher run -o o --precision half", "Did you mean 'fp16'", ""),
    ("embed --data two.csv --teacher run -o o --views 0", "0 is not in the range", ""),
    (f"{DISTILL} -o o", "There are no training data", DISTIL_TWO),
    ("average", "Missing argument 'FIRST'", ""),
    ("average nothing run -o o", "No model named 'nothing'", None),
    ("recipe shw", "Did you mean 'show'", "recipe show"),
    ("recipe show clip-rdd", "Did you mean 'clip-rd'", "recipe show clip-rd"),
    ("recipe show broken.yaml", "is not valid YAML", "recipe show clip-rd"),
    ("benchmark", "SUITE is missing", ""),
    ("benchmark quickstart", "-o FOLDER is missing", ""),
    ("benchmark nothing -o o", "There is no suite 'nothing'", "benchmark --init"),
    ("benchmark broken.yaml -o o", "is not valid YAML", "benchmark --init"),
    ("benchmark quickstart -o o --model studnt=B", "Did you mean 'student'", None),
    ("benchmark --compare nothing R", "Cannot read nothing", "benchmark --compare R R"),
    ("evidence report", "Missing argument", ""),
    ("evidence report nothing nothing", "Cannot read nothing", None),
    ("devices cpu-x68", "Did you mean 'cpu-x86'", "devices cpu-x86"),
    ("devices raspberry", "No device is named 'raspberry'", "devices"),
    ("distill", "Missing option '--student'", ""),
    ("distill --student resnet18 --recipe clip -o o", "There are no training data", None),
    ("distill --images photos --student resnet18 --recipe clip -o o", "There are images, but no captions", None),
    ("distill --data nothing.csv --student resnet18 --recipe clip -o o", "does not exist", DISTIL_TWO),
    ("distill --data one.csv --student resnet18 --recipe clip -o o", "has 1 pair;", DISTIL_TWO),
    (f"{DISTILL} --data columns.csv -o o", "has no column 'filepath'; its columns are 'image', 'caption'",
     f"{DISTILL} --data columns.csv -o o --csv-img-key image --csv-caption-key caption"),
    ("distill --data one.csv --student resnet18 --recipe clp -o o", "Did you mean 'clip'", "recipe show clip"),
    ("distill --data one.csv --student resnet18 --batch-size 0 -o o", "0 is not in the range", ""),
    ("distill --data one.csv --student resnet18 -o photos", "already exists and is not empty", DISTIL_TWO),
    ("quickstart --student resnet81 -o o", "resnet81", None),
    ("quickstart --recipe clp -o o", "Did you mean 'clip'", "recipe show clip"),
    ("quickstart extra", "unexpected extra argument", ""),
    ("stitch", "Missing argument 'CLASSIFIER'", ""),
    ("trim run -o o", "Nothing is to be trimmed", None),
    ("trim run --vocabulary 9 -o o", "there are no texts that tell which tokens", None),
    ("trim run --text-layers 1 -o run --force", "contains run/student, which it would replace", None),
    ("stitch resnet18 --names nothing.txt --text all-MiniLM-L6-v2 -o o", "Cannot read nothing.txt", None),
    ("demo", "Missing argument", ""),
    ("demo nothing", "it does not exist", None),
    ("demo B --port 99999", "99999 is not in the range", ""),
    ("serve nothing", "it does not exist", None),
    ("serve B nothing", "is not an index", None),
    ("serve B --token-file nothing.txt", "nothing.txt: No such file or directory", None),
    ("evidence rn", "Did you mean 'run'", ""),
    ("evidence run nothing -o o", "There is no suite 'nothing'", "benchmark --init"),
    ("evidence report nothing.json", "Cannot read nothing.json", None),
    ("doctor extra", "unexpected extra argument", ""),
    (f"classify B photos/rde.png {LABELS}", "Did you mean 'photos/red.png'", f"classify B photos/red.png {LABELS}"),
    (f"classify BB P {LABELS}", "it does not exist. Did you mean 'B'", f"classify B P {LABELS}"),
    (f"{DISTILL} --data tow.csv -o o", "Did you mean 'two.csv'", DISTIL_TWO),
    (f"{DISTILL} --images photo --texts labels.txt -o o", "Did you mean 'photos'", None),
    (f"{DISTILL} --images photos --texts 'a red thing' -o o", "Cannot read a red thing: there is no such file", None),
    ("index B photo -o i", "The folder photo does not exist. Did you mean 'photos'", "index B photos -o i"),
    ("index B photo -o i --watch", "The folder photo does not exist. Did you mean 'photos'", "index B photos -o i"),
    ("evaluate B --task taskz", "Did you mean 'tasks'", "evaluate B --task tasks"),
    ("stitch resnet18 --names imagnet --text all-MiniLM-L6-v2 -o o", "Did you mean 'imagenet'", None),
    ("stitch tf_efficientnet_liteO --names imagenet --text x -o o", "Did you mean 'tf_efficientnet_lite0'", None),
    ("stitch resnet18 --names imagenet --text x --pretrained P -o o", "The weights P could not be read", None),
    ("average run ViT-B-16 -o o", "ViT-B-16 was given without weights", "average run run -o a"),
    ("average run B -o o", "B is a bundle, which has no weights", "average run run -o a"),
    (f"{DISTILL} --data two.csv --pretrained-image P -o o", "The weights P could not be read", None),
    (f"{DISTILL} --data two.csv --pretrained-text P -o o", "The weights P could not be read", None),
    (f"{DISTILL} --images fotos --texts labels.txt -o o", "The source of images fotos does not exist", None),
    (f"{DISTILL} --images tasks/red/red.png --texts labels.txt -o o", "is a single image", None),
    (f"{DISTILL} --data tasks/red/red.png -o o", "is an image, and not a table", DISTIL_TWO),
    ("export run -o o --format litert --precision bf16", "litert does not support bf16", EXPORT_RUN),
    ("export run -o o --format executorch --layout huggingface", "expected --format onnx", EXPORT_RUN),
    ("serve B --token-file empty.txt", "The token file empty.txt is empty", None),
    ("serve B --host 999.1.1.1", "Cannot listen on 999.1.1.1", None),
    ("demo B --host 999.1.1.1", "Cannot listen on 999.1.1.1", None),
]  # fmt: skip


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run."""
    import clip_rd_edge as edge

    folder = tmp_path_factory.mktemp("trained")
    for name in ("red", "green"):
        Image.new("RGB", (40, 30), name).save(folder / f"{name}.png")
    (folder / "pairs.csv").write_text("filepath,title\n" + "red.png,red\ngreen.png,green\n" * 3)
    edge.distill(
        data=folder / "pairs.csv", student="test_resnet", recipe="clip", output=folder / "run", text="tiny",
        image_size=32, context_length=8, embedding_size=16, batch_size=6, precision="fp32", workers=0, steps=1,
    )  # fmt: skip
    return folder / "run"


@pytest.fixture
def place(
    colour_bundle: Path, colour_images: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A working folder with a bundle B, an image P, a folder of photos, a run, results R and faulty files."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(colour_bundle, "B")
    shutil.copytree(trained, "run")
    shutil.copy(colour_images / "red.png", "P")
    shutil.copy(RESULTS, "R")
    pairs = "photos/red.png,red\nphotos/green.png,green\n" * 3
    files = {
        "broken.png": "no image", "empty.txt": "", "labels.txt": "red\ngreen\n", "broken.yaml": "rows: [",
        "one.csv": "filepath,title\nphotos/red.png,red\n",
        "two.csv": f"filepath,title\n{pairs}", "columns.csv": f"image,caption\n{pairs}",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "empty").mkdir()
    shutil.copytree(trained, "unfinished", ignore=shutil.ignore_patterns("student", "best"))
    for colour in ("red", "green"):
        (tmp_path / "tasks" / colour).mkdir(parents=True)
        shutil.copy(colour_images / f"{colour}.png", tmp_path / "tasks" / colour)
    return tmp_path


@pytest.mark.parametrize(("command", "message", "mended"), CASES, ids=[case[0] for case in CASES])
def test_wrong_input_gets_a_sentence_and_a_hint_that_helps(
    place: Path, command_line: Run, command: str, message: str, mended: str | None
) -> None:
    if " I " in f"{command} {mended or ''} ":
        assert command_line("index", "B", "photos", "-o", "I")[0] == 0
    before = sorted(place.rglob("*"))
    code, output, error = command_line(*shlex.split(command))
    assert (code, output) == (2, "")
    sentence, hint = (line.partition(": ") for line in error.strip().splitlines()[-2:])
    assert (sentence[0], hint[0]) == ("error", "hint")
    assert any(part in sentence[2] for part in message.split("|"))
    assert len(error.strip().splitlines()) <= 3  # with the line that a long command starts with
    assert [path for path in sorted(place.rglob("*")) if path not in before and path.name not in ("I", "i")] == []
    if mended:
        assert command_line(*shlex.split(mended))[0] == 0
    elif mended == "":
        follow(hint[2], command_line)


def follow(hint: str, command_line: Run) -> None:
    """Run the command in a hint, or parse it where it is an example with names of its own."""
    found = re.search(r"clip-rd-edge ((?:[a-z]+ )+--help|devices)", hint)
    if found:
        assert command_line(*shlex.split(found[1]))[0] == 0
        return
    arguments = shlex.split(hint[hint.index("clip-rd-edge ") :])[1:]
    name, command, rest = cli.resolve_command(click.Context(cli), arguments)
    assert command is not None
    command.make_context(name, list(rest))
