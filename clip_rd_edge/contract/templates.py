"""Prompt templates: sentences with a place for a label, such as `a photo of a {}.`"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from clip_rd_edge.contract.encoder import as_list
from clip_rd_edge.errors import InputError, near_matches, quoted
from clip_rd_edge.utils.files import read_text_limited, text_lines
from clip_rd_edge.utils.paths import as_text, expand_home, near_files
from clip_rd_edge.utils.trust import Typed

_PLACEHOLDERS = ("{}", "{c}")  # the latter in CLIP_benchmark's files
IMAGENET = "imagenet"  # names CLIP's templates on the command line
_IMAGENET_FILE = Path(__file__).with_name("imagenet_templates.txt")


@dataclass(frozen=True)
class Templates:
    """Prompt templates with one `{}` (or `{c}`) for the label's name, and their origin as shown in reports."""

    prompts: tuple[str, ...]
    origin: str


@cache
def imagenet_templates() -> Templates:
    """Return the 80 templates that CLIP was evaluated with on ImageNet.

    Source: https://github.com/openai/CLIP, notebooks/Prompt_Engineering_for_ImageNet.ipynb (MIT, see NOTICE).
    """
    return Templates(tuple(_IMAGENET_FILE.read_text(encoding="utf-8").splitlines()), "CLIP's for ImageNet")


# Templates in Python: one or several, each as for `parse_templates`; a path; or None.
TemplateNames = Iterable[str] | str | os.PathLike[str] | None


def template_words(templates: TemplateNames) -> list[Typed]:
    """Return the templates of a call in Python for `parse_templates`; none are the model's own templates."""
    return [] if templates is None else [Typed(word) for word in as_list(as_text(templates))]


def parse_templates(words: Sequence[Typed]) -> Templates:
    """Return the templates that a user names: templates, `imagenet` for CLIP's, or files with one template per line."""
    if list(words) == [IMAGENET]:
        return imagenet_templates()
    prompts: list[str] = []
    for word in words:
        if is_template(word):
            prompts.append(word)
        elif word == IMAGENET:
            prompts += imagenet_templates().prompts
        else:
            prompts += _read_file(word)
    return Templates(tuple(prompts), "given")


def is_template(text: str) -> bool:
    """Return whether a text has a place for a label; otherwise, it names a file of templates, or CLIP's."""
    return any(placeholder in text for placeholder in _PLACEHOLDERS)


def in_words(templates: Sequence[str]) -> str:
    """Return what to call these templates in a sentence."""
    return f"the template {templates[0]!r}" if len(templates) == 1 else f"a list of {len(templates)} templates"


def _read_file(word: Typed) -> list[str]:
    path = expand_home(word)
    try:
        lines = [line.strip() for line in text_lines(read_text_limited(path)) if line.strip()]
    except InputError as error:
        suggestion = near_matches(word, [IMAGENET]) or near_files(path)
        raise InputError(
            f"The template {quoted(word)} has no {{}} for the label's name, and is no readable file.{suggestion}",
            hint=f'pass {{templates}} "{word.strip()} {{}}", the file of templates, or {IMAGENET} for CLIP\'s 80',
        ) from error
    if missing := [number for number, line in enumerate(lines, start=1) if not is_template(line)]:
        raise InputError(
            f"{path}, template {missing[0]}, has no {{}} for the label's name: {lines[missing[0] - 1]!r}.",
            hint="write one template per line, such as: a photo of a {}.",
        )
    if not lines:
        raise InputError(f"{path} has no templates.", hint="write one template per line, such as: a photo of a {}.")
    return lines
