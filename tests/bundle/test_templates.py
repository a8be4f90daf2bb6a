from __future__ import annotations

from pathlib import Path

import pytest

from clip_rd_edge.bundle.labels import Templates, imagenet_templates, parse_templates
from clip_rd_edge.errors import InputError


def test_clips_templates_are_those_of_open_clip() -> None:
    open_clip = pytest.importorskip("open_clip")
    assert imagenet_templates().prompts == tuple(fill("{}") for fill in open_clip.OPENAI_IMAGENET_TEMPLATES)


def test_templates_are_given_as_they_are_by_name_or_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "templates.txt"
    file.write_text("a {c}\n\nthe {}\n")
    assert parse_templates(["imagenet"]) is imagenet_templates()
    assert parse_templates(["{}", str(file)]) == Templates(("{}", "a {c}", "the {}"), "given")
    assert parse_templates(["{}", "imagenet"]).prompts == ("{}", *imagenet_templates().prompts)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("a photo", "has no {} for the label's name, and is no readable file"),
        ("imagnet", "Did you mean 'imagenet'"),
        ("templatez.txt", "Did you mean 'templates.txt'"),
        ("templates.txt", "template 2, has no {} for the label's name: 'the'"),
        ("empty.txt", "has no templates"),
    ],
)
def test_what_is_no_template_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, message: str
) -> None:
    (tmp_path / "templates.txt").write_text("a {}\nthe\n")
    (tmp_path / "empty.txt").write_text("\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as raised:
        parse_templates([word])
    assert message in str(raised.value)
    assert raised.value.hint
