"""Text of unknown origin is shown, and never obeyed: by a terminal, rich, a spreadsheet or a Markdown viewer.

And messages on a narrow terminal are broken at spaces, so that commands in them can be copied.
"""

from __future__ import annotations

import ast
import csv
import io
import os
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image
from rich.table import Table
from rich.text import Text
from support import CommandLine, Terminal

import clip_rd_edge
from clip_rd_edge.cli.console import ConsoleReporter, SafeConsole, console_reporter, print_table
from clip_rd_edge.cli.output import echo
from clip_rd_edge.utils.text import as_word, printable

HOSTILE = ["\x1b[2J", "\x1b]52;c;ZXZpbA==\x07", "\x9b31m", "\u202egnp.exe", "a\rb", "a\x08b", "\x1b]8;;http://x\x1b\\"]
MARKUP = ["[/nope]", "[bold]x[/bold]", "[link=http://x]y[/link]", ":smile:", "[red", "\\[x]", "a\\"]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_terminal_gets_no_escapes_and_a_pipe_gets_names_as_they_are(text: str) -> None:
    shown = printable(f"naïve 猫 👩‍🚀\t{text}\n")
    assert shown.startswith("naïve 猫 👩‍🚀\t")
    assert shown.endswith("\n")
    assert all(character.isprintable() or character in "\t\n\u200d" for character in shown)
    terminal, pipe = Terminal(), io.StringIO()
    echo(f"photos/{text}.png", file=terminal)
    echo(f"photos/{text}.png", file=pipe)
    assert terminal.getvalue() == f"photos/{printable(text)}.png\n"
    assert pipe.getvalue() == f"photos/{text}.png\n"


@pytest.mark.parametrize("text", [*HOSTILE, *MARKUP])
def test_tables_progress_and_messages_show_any_text_as_it_is(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    stream = Terminal()
    console = SafeConsole(file=stream, force_terminal=True, width=200, color_system=None)
    table = Table(text, title=text)
    table.add_row(text)
    table.add_row(Text(text, style="bold"))
    print_table(table, console=console)
    assert stream.getvalue().count(printable(text)) >= 3  # rich removes some control characters from a Text
    assert text in MARKUP or text not in stream.getvalue()
    monkeypatch.setattr("clip_rd_edge.cli.console.stderr", console)
    with console_reporter() as reporter:
        assert isinstance(reporter, ConsoleReporter)
        reporter.update(text, 1, 2, text)
        reporter.note(text)
        reporter.begin(text, 1, 1)
        reporter.note(text)
    assert stream.getvalue().count(printable(text)) >= 7


def test_commands_print_with_echo_and_safe_consoles_only() -> None:
    unsafe = []
    for path in (Path(clip_rd_edge.__file__).parent / "cli").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or path.name in ("output.py",):
                continue
            name = ast.unparse(node.func)
            constant = bool(node.args) and isinstance(node.args[0], ast.Constant)
            if name in ("print", "click.secho", "Console") or (name == "click.echo" and not constant):
                unsafe.append(f"{path.name}:{node.lineno}: {name}")
    assert unsafe == []


def test_classify_and_errors_escape_names_on_a_terminal(
    colour_bundle: Path, tmp_path: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (9, 9), (200, 0, 0)).save(folder / "\x1b[31mred\n.png")
    (folder / "\x1b]0;title\x07.png").write_bytes(b"no image")
    code, output, error = command_line("classify", colour_bundle, folder, "--labels", "red", "green", "[/nope]")
    assert code == 2
    assert "\x1b" not in error
    assert "\\x1b]0;title\\x07.png" in error
    assert output.count("\n") == 1  # a pipe gets one line per image
    monkeypatch.setattr(sys, "stdout", Terminal())
    from clip_rd_edge.cli.main import main

    with pytest.raises(SystemExit):
        main()
    shown = sys.stdout.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in shown
    assert "\\x1b[31mred\\n.png" in shown
    code, _, error = command_line("classify", "--\x1b[31m")
    assert (code, "\x1b" in error, "\\x1b[31m" in error) == (2, False, True)


@pytest.mark.parametrize("label", ['=HYPERLINK("http://x")', "+1", "-1", "@SUM(A1)", "\t=1", " =1", "\r=1"])
def test_csv_has_no_cell_that_a_spreadsheet_computes(
    colour_bundle: Path, tmp_path: Path, command_line: CommandLine, label: str
) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text(f"{label}\nred\n", newline="")
    image = tmp_path / "a.png"
    Image.new("RGB", (9, 9), (200, 0, 0)).save(image)
    code, output, _ = command_line("classify", colour_bundle, image, "--labels", labels, "--csv")
    assert code == 0
    for row in list(csv.reader(io.StringIO(output)))[1:]:
        for cell in (row[0], row[2]):
            assert not cell.lstrip(" ").startswith(("=", "+", "-", "@", "\t", "\r"))


@pytest.mark.skipif(os.name != "posix", reason="of POSIX shells")
def test_a_path_in_a_command_to_copy_is_one_word() -> None:
    for path in ("runs/first", "runs/#1 of ü", "it's", "a{0..1}.tar"):
        assert shlex.split(as_word(path), comments=True) == [path]
    assert as_word("-dash") == "./-dash"
