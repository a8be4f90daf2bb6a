"""Every file of the corpus, most of which once broke something, is answered, or refused in a sentence."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
from readers import answer_or_sentence, readers

from benchmarks.robustness.hostile_input import COMMANDS, CORPUS, GOOD, HEADS, MAX_SECONDS, huge_file, run_all, unpacked

KINDS = readers(GOOD / "bundle")
FILES = sorted(path for kind in KINDS for path in (CORPUS / kind).iterdir())


@pytest.mark.parametrize("path", FILES, ids=[f"{path.parent.name}/{path.name}" for path in FILES])
def test_hostile_input_gets_an_answer_or_a_sentence(path: Path, tmp_path: Path) -> None:
    file = unpacked(path, tmp_path)
    answer_or_sentence(lambda: KINDS[path.parent.name](file))


@pytest.mark.parametrize("kind", sorted(KINDS.keys() & HEADS.keys()))
def test_a_file_of_any_size_is_refused_before_it_is_read(kind: str, tmp_path: Path) -> None:
    path = huge_file(kind, tmp_path)
    answer_or_sentence(lambda: KINDS[kind](path))


def test_every_kind_of_file_has_a_reader_and_commands() -> None:
    kinds = {path.name for path in CORPUS.iterdir()} - {"good", "requests"}
    assert kinds == COMMANDS.keys()
    assert kinds - KINDS.keys() == {"teachers"}  # which need torch


def test_the_good_files_get_an_answer(tmp_path: Path) -> None:
    for kind, name in (("tokenizers", "tokenizer.json"), ("manifests", "manifest.json"), ("towers", "image.onnx")):
        copy = Path(shutil.copy(GOOD / "bundle" / name, tmp_path))
        assert not isinstance(answer_or_sentence(partial(KINDS[kind], copy)), Exception)
    assert not isinstance(answer_or_sentence(partial(KINDS["images"], GOOD / "red.png")), Exception)


def test_commands_with_little_memory_end_with_a_sentence() -> None:
    outcomes = run_all(["indexes"], torch=False)
    assert len(outcomes) > 20
    assert [outcome for outcome in outcomes if outcome.problem] == []
    assert {outcome.code for outcome in outcomes} == {2}
    assert max(outcome.seconds for outcome in outcomes) < MAX_SECONDS


@pytest.mark.slow
@pytest.mark.parametrize("torch", [False, True])
def test_every_command_with_little_memory_ends_with_a_sentence(torch: bool) -> None:
    outcomes = run_all(list(COMMANDS), torch=torch)
    assert [outcome for outcome in outcomes if outcome.problem] == []
