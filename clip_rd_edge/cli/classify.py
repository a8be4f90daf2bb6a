"""`clip-rd-edge classify`: what pictures show, among labels, without torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from clip_rd_edge.errors import InputError

if TYPE_CHECKING:
    from clip_rd_edge.runtime import Prediction, ZeroShotClassifier


class _Labels(click.Option):
    """An option that takes all that follows up to the next option: --labels "a cat" "a dog"."""

    def add_to_parser(self, parser: click.parser._OptionParser, ctx: click.Context) -> None:
        super().add_to_parser(parser, ctx)
        ours = next(parser._long_opt[name] for name in self.opts if name in parser._long_opt)
        process = ours.process

        def take_all(value: str, state: click.parser._ParsingState) -> None:
            process(value, state)
            while state.rargs and not state.rargs[0].startswith("-"):
                process(state.rargs.pop(0), state)

        ours.process = take_all  # type: ignore[method-assign]


@click.command("classify", short_help="Say what a picture shows, among labels of yours.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("pictures", nargs=-1, required=True, metavar="PICTURE...")
@click.option(
    "--labels", cls=_Labels, multiple=True,
    help='The labels: "a cat" "a dog" …, or a text file with one a line. Default: the bundle\'s label bank.',
)  # fmt: skip
@click.option("--template", "templates", multiple=True, help='Prompt with {} for the label, such as "a photo of a {}".')
@click.option("--top", type=click.IntRange(1), default=3, show_default=True, help="How many labels to show.")
@click.option("--threads", type=click.IntRange(1), help="Threads; default: every core.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def command(
    bundle: Path,
    pictures: tuple[str, ...],
    labels: tuple[str, ...],
    templates: tuple[str, ...],
    top: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Say what each PICTURE shows. A PICTURE is a file, a folder, or - for a list of paths on stdin.

    \b
    clip-rd-edge classify bundle cat.jpg --labels "a cat" "a dog"
    """
    from clip_rd_edge.runtime import ZeroShotClassifier, load

    paths = list(find_pictures(pictures))
    classifier = ZeroShotClassifier(load(bundle, threads=threads), _read(labels), templates=templates or None)
    unreadable = 0
    for path in paths:
        try:
            answers = _classify(classifier, path, top)
        except InputError as error:
            if len(paths) == 1:
                raise
            # One bad picture among many is reported and counted, not fatal.
            click.echo(f"error: {error}", err=True)
            unreadable += 1
            continue
        click.echo(_as_json(path, answers) if as_json else _as_text(path, answers))
    if unreadable:
        raise InputError(f"{unreadable} of {len(paths)} pictures could not be read; the others are answered above.")


def find_pictures(names: tuple[str, ...]) -> Iterator[Path]:
    """The pictures that are meant by files, folders (searched through) and `-` (paths on stdin).

    Raises:
        InputError: a file or folder is not there, or a folder has no pictures.
    """
    from clip_rd_edge.data.tasks import IMAGE_SUFFIXES

    for name in names:
        path = Path(name)
        if name == "-":
            yield from (Path(line.strip()) for line in sys.stdin if line.strip())
        elif path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise InputError(f"The folder {path} has no pictures.")
            yield from found
        elif path.is_file():
            yield path
        else:
            raise InputError(f"There is no picture or folder {name}.", hint="check the path")


def _read(labels: tuple[str, ...]) -> list[str] | None:
    if len(labels) == 1 and Path(labels[0]).is_file():
        from clip_rd_edge.cli._labels import read_labels_file

        return read_labels_file(Path(labels[0]))
    return list(labels) or None


def _classify(classifier: ZeroShotClassifier, path: Path, top: int) -> list[Prediction]:
    from clip_rd_edge.contract.preprocess import open_image

    return classifier.classify([open_image(path)], top=top)[0]


def _as_text(path: Path, answers: list[Prediction]) -> str:
    return f"{path}\t" + "  ".join(f"{label} {probability:.1%}" for label, probability in answers)


def _as_json(path: Path, answers: list[Prediction]) -> str:
    predictions = [{"label": label, "probability": round(probability, 6)} for label, probability in answers]
    return json.dumps({"picture": str(path), "predictions": predictions}, ensure_ascii=False)
