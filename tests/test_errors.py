"""Errors: every one that the package raises is one sentence, and names options as the front end that shows it does."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from support import commands

import clip_rd_edge
from clip_rd_edge import errors
from clip_rd_edge.cli.main import spelling
from clip_rd_edge.errors import UsageError, in_one_line

PACKAGE = Path(clip_rd_edge.__file__).parent


def test_the_reason_of_onnx_runtime_is_told_without_the_place_in_its_code() -> None:
    """That alone has more characters than a message shows of a reason."""
    function = "std::conditional_t<THRW, void, common::Status> onnxruntime::CudaCall(ERRTYPE, const char*, SUCCTYPE)"
    place = f"/onnxruntime_src/core/cuda/cuda_call.cc:114 {function} [with ERRTYPE = cudaError; bool THRW = true] "
    error = RuntimeError(f"[ONNXRuntimeError] : 1 : FAIL : {2 * place}CUDA failure 35: an old driver (535) ; GPU=0")
    assert in_one_line(error) == "CUDA failure 35: an old driver (535) ; GPU=0"


# Reasons that another sentence takes up.
PARTS = {
    "{} does not match its checksum",
    "it names the image {}, which is not in its folder",
    "The tokenizer turns {} into other ids here than at the export",
    "Item {} begins with {}; expected a text, or an image: {}…;base64,…",
}


@cache
def raised() -> list[tuple[str, str, str]]:
    """The place, message and hint of every error in the package's code; {} stands for what is formatted into them."""

    def rendered(node: ast.expr) -> str:
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.JoinedStr):
            parts = node.values
            return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)
        return "{}"  # made elsewhere

    found = list[tuple[str, str, str]]()
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            kind = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Call) and node.args and kind.endswith("Error") and hasattr(errors, kind):
                if kind == "MissingExtraError":  # takes a package, and makes the sentence itself
                    continue
                hints = [word.value for word in node.keywords if word.arg == "hint"]
                hint = rendered(hints[0]) if hints else ""
                found.append((f"{file.name}:{node.lineno}", rendered(node.args[0]), hint))
    return found


def test_every_error_is_one_sentence_and_its_ways_out_are_none() -> None:
    assert len(raised()) > 200
    problems = []
    for place, message, hint in raised():
        # What is formatted into a message may be a sentence, with its full stop.
        is_whole = message.endswith((".", "?", "{}")) or message in PARTS
        if not is_whole or "\n" in message or len(message) > 400:
            problems.append(f"{place}: {message}")
        if (hint.endswith(".") and "{}" not in hint) or len(hint) > 400:
            problems.append(f"{place}: {hint}")
    assert problems == []


def test_every_option_that_an_error_names_is_one_of_a_command() -> None:
    options = {parameter.name for _, command in commands() for parameter in command.params}
    options |= {getattr(parameter, "also", "") for _, command in commands() for parameter in command.params}
    texts = [(place, f"{message} {hint}") for place, message, hint in raised()]
    named = {(name, place) for place, text in texts for name in re.findall(r"\{([a-z]+(?:_[a-z]+)*)\}", text)}
    assert len(named) > 50
    assert {(name, place) for name, place in named if name not in options} == set()


@pytest.mark.parametrize(
    ("command", "hint", "expected"),
    [
        ("distill", "the same command and {resume}", "the same command and --resume"),
        ("export", "fix them, or accept them: {max_bad} 0.1", "fix them"),
        ("distill", "add {pretrained} with a tag", "add --teacher-pretrained with a tag"),
        ("evaluate", "name {tasks} a/, or {templates} x", "name --task a/, or --template x"),
        ("evidence run", "use {teacher}, or {resume}", "use --teacher"),
        ("nonsense", "use {batch_size}", "use --batch-size"),
    ],
)
def test_a_hint_names_the_options_of_the_command_and_leaves_out_the_ways_that_it_lacks(
    command: str, hint: str, expected: str
) -> None:
    error = UsageError("No.", hint=hint)
    assert error.hint_for(spelling([*command.split(), "--some-value", "value"])) == expected


def test_python_and_the_command_line_name_one_option_each_their_own_way() -> None:
    error = UsageError("{batch_size} is 4, but data/{000..012}.tar has 3.", hint="{batch_size} 3, or {x}")
    assert (str(error), error.hint) == ("batch_size is 4, but data/{000..012}.tar has 3.", "batch_size 3, or x")
    spell = spelling(["distill"])
    assert error.message_for(spell) == "--batch-size is 4, but data/{000..012}.tar has 3."
    assert error.hint_for(spell) == "--batch-size 3"
