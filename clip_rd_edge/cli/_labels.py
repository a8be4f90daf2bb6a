"""Labels: the option that takes them, and a text file that holds them."""

from __future__ import annotations

from pathlib import Path

import click

from clip_rd_edge.errors import InputError


class LabelsOption(click.Option):
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


def read_labels(labels: tuple[str, ...]) -> list[str] | None:
    """What a LabelsOption got: labels, or the path of a file of them; None where it was not given.

    Raises:
        InputError: as `read_labels_file`.
    """
    if len(labels) == 1 and Path(labels[0]).is_file():
        return read_labels_file(Path(labels[0]))
    return list(labels) or None


def read_labels_file(path: Path) -> list[str]:
    """Labels, one a line; empty lines are passed over.

    Raises:
        InputError: no such file, not UTF-8, or no label in it.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"Cannot read the labels {path}: {error.strerror or error}.", hint="check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"The labels {path} are not UTF-8 text: {error.reason} at byte {error.start}.") from error
    labels = [line.strip() for line in lines if line.strip()]
    if not labels:
        raise InputError(f"{path} has no labels; expected one a line.")
    return labels
