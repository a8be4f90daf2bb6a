"""Every code block of the README and of the guide is run, parsed, or marked with the reason why it is not.

Blocks of a page run in their order, in one folder with a small bundle and a few images; `Small` says what is smaller
than on the page.
"""

from __future__ import annotations

import ast
import io
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from PIL import Image

import clip_rd_edge as edge
from clip_rd_edge.benchmarking.suite import read_suite
from clip_rd_edge.bundle.labels import background_nouns
from clip_rd_edge.bundle.manifest import FORMAT_VERSION, Manifest, read_manifest
from clip_rd_edge.cli.main import cli
from clip_rd_edge.distillation.config import load_recipe, resolve
from clip_rd_edge.distillation.reinforced import StoredTeachers
from clip_rd_edge.evidence.suite import read_evidence
from clip_rd_edge.exporting.plan import plan_exports
from clip_rd_edge.losses.terms import load_terms
from clip_rd_edge.models.students import build_student, student_config
from clip_rd_edge.settings.deploying import Export
from clip_rd_edge.utils.paths import typed
from clip_rd_edge.utils.structs import read_json

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
# Pages of the site whose command lines are parsed; their blocks need figures, devices or data that a test has not.
PARSED_PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for pattern in ("export/**/README.md", "benchmarks/**/*.md", "examples/**/README.md")
    for path in sorted(ROOT.glob(pattern))
    if "results" not in path.parts
}
FENCE = re.compile(r"^ *```(\w*)(?: +title=\"([^\"]+)\")?")
MARKER = re.compile(r"<!-- (not run|parsed only): [^>]+ -->")
SHELL = ("sh", "bash", "console")
# Commands that take less than a second on a small bundle; the others are parsed.
RUN = {"classify", "targets", "doctor", "evaluate", "index", "search", "teach", "verify"}
OTHER_PROGRAMS = {".", "cd", "cp", "curl", "done", "find", "for", "git", "hf", "scp", "ssh"}
TINY: dict[str, Any] = {
    "student": "test_resnet", "steps": 2, "batch_size": 8, "text": "tiny", "image_size": 32, "context_length": 8,
    "embedding_size": 16, "precision": "fp32", "workers": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A fenced block; `marker` is `not run`, `parsed only`, or empty."""

    place: str
    language: str
    title: str
    code: str
    marker: str


def read_blocks(name: str, path: Path) -> Iterator[Block]:
    lines = path.read_text(encoding="utf-8").splitlines()
    start, before = None, ""
    for number, line in enumerate(lines, start=1):
        if fence := FENCE.match(line):
            if start is None:
                start, opening = number, fence
            else:
                marker = MARKER.fullmatch(before.strip())
                code = "\n".join(lines[start : number - 1])
                yield Block(f"{name}:{start}", opening[1], opening[2] or "", code, marker[1] if marker else "")
                start, before = None, ""
        elif start is None and line.strip():
            before = line
    assert start is None, f"{name}:{start} begins a block that does not end"


def blocks_of(name: str) -> list[Block]:
    return list(read_blocks(name, {**PAGES, **PARSED_PAGES}[name]))


def command_lines(code: str) -> Iterator[list[str]]:
    """The simple commands of a shell block, without comments, redirections and variables' values."""
    for line in code.replace("\\\n", " ").splitlines():
        line = re.sub(r"\$\{?\w+\}?", "0", line.removeprefix("$ "))
        command: list[str] = []
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        for word in [*words, ";"]:
            if word in (";", "|", "&&", "||"):
                if command:
                    yield command
                command = []
            elif word != "do":
                command.append(word)


def arguments_of(command: Sequence[str]) -> list[str] | None:
    """What `clip-rd-edge` is called with, in whichever form; None where another program is called."""
    words = list(command)
    if ">" in words:
        del words[words.index(">") :]
    if Path(words[0]).name == "clip-rd-edge":
        return words[1:]
    if words[0] in ("python", "torchrun") and "clip_rd_edge" in words:
        return words[words.index("clip_rd_edge") + 1 :]
    return None


def parse(arguments: Sequence[str], group: click.Group = cli, parent: click.Context | None = None) -> None:
    """Resolve a command and its options without running it; raises click.UsageError where they do not fit."""
    context = click.Context(group, info_name="clip-rd-edge", parent=parent)
    name, *rest = arguments
    command = group.get_command(context, name)
    assert command is not None, f"there is no command {name!r}"
    if isinstance(command, click.Group):
        parse(rest, command, context)
    else:
        command.make_context(name, rest, parent=context)


def check_command(command: Sequence[str], place: str) -> None:
    """A command line as a reader would copy it: its options, extras, targets and files have to be there."""
    if (arguments := arguments_of(command)) is not None:
        try:
            parse(arguments)
        except click.ClickException as error:
            raise AssertionError(f"{place}: {shlex.join(command)}: {error.format_message()}") from error
        if "--target" in arguments:
            for target in arguments[arguments.index("--target") + 1].split(","):
                assert target in edge.targets() or re.fullmatch(r"sm\d+", target), f"{place}: no target {target}"
    elif Path(command[0]).name == "make":
        for target in command[1:]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"{place}: make {target}"
    elif Path(command[0]).name == "pip":
        extras = re.findall(r"\[([\w,-]+)\]", shlex.join(command))
        for extra in ",".join(extras).split(",") if extras else ():
            assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE), (
                f"{place}: {extra}"
            )
    elif command[0] in ("python", "python3", "bash"):
        scripts = [word for word in command if word.endswith((".py", ".sh")) and "/" in word]
        scripts += [f"{word.replace('.', '/')}.py" for word in command if word.startswith("benchmarks.")]
        assert all((ROOT / script).is_file() for script in scripts), f"{place}: no file {scripts}"
    else:
        assert command[0] in OTHER_PROGRAMS, f"{place}: {command[0]} is neither checked nor known; mark the block"


@pytest.mark.parametrize("name", PAGES)
def test_every_block_is_run_parsed_or_marked(name: str) -> None:
    for block in blocks_of(name):
        checked = block.language in ("python", *SHELL) or block.title in READERS
        assert checked or block.marker, f"{block.place}: a {block.language or 'plain'} block; say why it is not run"


@pytest.mark.parametrize("name", [*PAGES, *PARSED_PAGES])
def test_command_lines_parse(name: str) -> None:
    for block in blocks_of(name):
        # Pages that `clip-rd-edge targets` shows have fences without a language.
        is_shell = block.language in SHELL or (name in PARSED_PAGES and "clip-rd-edge" in block.code)
        if is_shell and block.marker != "not run":
            for command in command_lines(block.code):
                if name in PAGES or arguments_of(command) is not None:
                    check_command(command, block.place)


def test_examples_in_the_help_parse() -> None:
    def examples(group: click.Group) -> Iterator[str]:
        for name in group.list_commands(click.Context(group)):
            command = group.get_command(click.Context(group), name)
            if isinstance(command, click.Group):
                yield from examples(command)
            elif command is not None:
                for paragraph in (command.help or "").split("\n\n"):
                    if paragraph.strip(" \n").startswith("\b"):
                        yield paragraph.strip(" \n").removeprefix("\b")

    shown = [command for code in examples(cli) for command in command_lines(re.sub(r"^ +", "", code, flags=re.M))]
    assert len(shown) > 10
    for command in shown:
        check_command(command, "the help")


@pytest.mark.parametrize("name", PAGES)
def test_python_blocks_import_nothing_below_the_front_door(name: str) -> None:
    for block in blocks_of(name):
        if block.language == "python":
            for node in ast.walk(ast.parse(block.code)):
                if isinstance(node, ast.Import):
                    modules = [alias.name for alias in node.names]
                else:
                    modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                below = [module for module in modules if module.startswith("clip_rd_edge.")]
                assert set(below) <= EXTENSIONS, block.place


def check_manifest(path: Path) -> None:
    manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    assert manifest.format_version == FORMAT_VERSION
    shown = msgspec.json.decode(path.read_bytes())
    whole = msgspec.to_builtins(manifest)
    assert [list(shown), list(shown["image"])] == [list(whole), list(whole["image"])]  # no field is left out


READERS: dict[str, Callable[[Path], object]] = {
    "recipe.yaml": lambda path: load_recipe(str(path)),
    "suite.yaml": read_suite,
    "evidence.yaml": lambda path: read_evidence(str(path)),
    "margin.yaml": lambda path: read_evidence(str(path)),
    "manifest.json": check_manifest,
    "teachers.json": lambda path: read_json(path, StoredTeachers),
    "my_terms.py": lambda path: load_terms(typed(path)),
    "my_relations.py": lambda path: load_terms(typed(path)),
    "student.json": lambda path: build_student(
        student_config(str(path), embedding_size=16, image_size=32, text="tiny", context_length=8), name="mine"
    ),
}
# What a term is written with; all else is imported from the front door.
EXTENSIONS = {"clip_rd_edge.losses.terms"}


def test_files_that_are_shown_can_be_read(tmp_path: Path) -> None:
    shown = [block for name in PAGES for block in blocks_of(name) if block.title]
    assert {block.title for block in shown} == READERS.keys()
    for block in shown:
        path = tmp_path / block.title
        path.write_text(block.code, encoding="utf-8")
        READERS[block.title](path)


class Small:
    """`edge.distill` and `edge.export` with the options that a page gives, but small.

    A training takes two steps of a tiny student; one that differs in size alone is copied. An export checks its options
    and gives the bundle that knows colours: a real one would take longer than all the rest of this file, and
    tests/test_front_door.py makes it.
    """

    bundle: Path

    def __init__(self, folder: Path) -> None:
        self._distill = edge.distill
        self._folder = folder
        self._done: dict[Any, Path] = {}
        for i in range(8):
            Image.new("RGB", (40, 30), (30 * i, 90, 200)).save(folder / f"{i}.png")
        rows = "".join(f"{i}.png,image number {i}\n" for i in range(8))
        (folder / "pairs.csv").write_text(f"filepath,title\n{rows}")
        self.run = self.distill(data=str(folder / "pairs.csv"), student="", recipe="clip", output=folder / "run")

    def distill(self, *, data: str | None = None, student: str, output: str | Path, **options: Any) -> Path:
        if options.get("teacher"):
            options |= {"teacher": f"local-dir:{self.run / 'student'}", "teacher_pretrained": None}
        key = (data is None, options.get("recipe"), options.get("teacher"), options.get("reporter"))
        options = {**options, **TINY, "data": data}
        shutil.rmtree(output, ignore_errors=True)
        if key not in self._done:
            offline = {name: value for name, value in options.items() if not name.startswith("pretrained_")}
            with pytest.MonkeyPatch.context() as patch:  # plots are half of a tiny training's time
                patch.setattr("clip_rd_edge.distillation.run.plot_run", lambda *_: None)
                self._done[key] = self._distill(output=self._folder / f"run-{len(self._done)}", **offline)
        recipe, not_of_the_run = options.pop("recipe", "clip-rd"), ("reporter", "resume")
        resolve(recipe, **{name: value for name, value in options.items() if name not in not_of_the_run})
        return Path(shutil.copytree(self._done[key], output))

    def export(self, model: str | Path, output: str | Path, **options: Any) -> edge.ExportedBundle:
        plan_exports(Export(model, output, **options))
        assert Path(model).is_dir()
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(self.bundle, output)
        return edge.ExportedBundle(Path(output), read_manifest(Path(output)))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(tmp_path_factory.mktemp("docs"))


@pytest.fixture
def reader(
    tmp_path: Path,
    colour_bundle: Path,
    colour_images: Path,
    pairs_csv: Path,
    small: Small,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The folder that somebody is in who reads the guide and has what it speaks of, all of it small."""
    folder = tmp_path / "reader"
    shutil.copytree(colour_images, folder / "photos")
    shutil.copytree(pairs_csv.parent / "pictures", folder / "frames")
    for bundle in ("bundle", "bundles/fp32", "bundles/int8"):
        shutil.copytree(colour_bundle, folder / bundle)
    shutil.copytree(small.run, folder / "runs/first")
    shutil.copytree(small.run / "student", folder / "quickstart/teacher/student")
    for colour in ("red", "green"):
        (folder / "my-images" / colour).mkdir(parents=True)
        shutil.copy(colour_images / f"{colour}.png", folder / "my-images" / colour)
    shutil.copy(colour_images / "blue.jpg", folder / "photo.jpg")
    (folder / "labels.txt").write_text("red\ngreen\nblue\n")
    for table in ("all.csv", "pairs.csv", "held-out.csv"):
        (folder / table).write_text(pairs_csv.read_text().replace("pictures/", f"{pairs_csv.parent}/pictures/"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO("photos/red.png\n"))
    monkeypatch.setattr("clip_rd_edge.api.measuring.first_answer", lambda *_: ["echo", "{}"])
    # `everyday` is really made, in a cache of the test's own, but in float32 and with few nouns: the search for INT8 is
    # most of its time, and is that of a slow test in tests/api/test_everyday.py.
    nouns = background_nouns()[::20]
    monkeypatch.setenv("CLIP_RD_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("clip_rd_edge.exporting.bundle.background_nouns", lambda: nouns)
    monkeypatch.setattr("clip_rd_edge.api.exporting.export", in_float32(edge.export))
    small.bundle = colour_bundle
    monkeypatch.setattr(edge, "distill", small.distill)
    monkeypatch.setattr(edge, "export", small.export)
    return folder


def in_float32(export: Callable[..., edge.ExportedBundle]) -> Callable[..., edge.ExportedBundle]:
    def wrapped(model: Path, output: Path, **options: Any) -> edge.ExportedBundle:
        return export(model, output, **{**options, "precision": "fp32", "calibration": None, "texts": None})

    return wrapped


def is_run(block: Block) -> bool:
    return not block.marker and (block.language == "python" or bool(list(lines_to_run(block))))


def lines_to_run(block: Block) -> Iterator[list[str]]:
    if block.language in SHELL:
        for command in command_lines(block.code):
            arguments = arguments_of(command)
            if arguments and arguments[0] in RUN:
                yield arguments


@pytest.mark.parametrize("name", [name for name in PAGES if any(map(is_run, blocks_of(name)))])
def test_blocks_run(name: str, reader: Path, command_line: Callable[..., tuple[int, str, str]]) -> None:
    namespace: dict[str, Any] = {}
    for block in blocks_of(name):
        if block.title:
            (reader / block.title).write_text(re.sub(r"rounds: \d+", "rounds: 2", block.code), encoding="utf-8")
        if block.marker:
            continue
        if block.language == "python":
            exec(compile(block.code, block.place, "exec"), namespace)
        for arguments in lines_to_run(block):
            code, _, errors = command_line(*arguments)
            assert code == 0, f"{block.place}: clip-rd-edge {shlex.join(arguments)}\n{errors}"


def test_links_of_the_readme_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) > 10
    for link in links:
        path, _, anchor = link.partition("#")
        if "://" not in path:
            assert (ROOT / path).exists(), link
            if anchor:
                headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}, link
