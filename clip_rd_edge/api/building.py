"""From a user's own images to a bundle on a device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from clip_rd_edge.api.models import open_encoder
from clip_rd_edge.settings.measuring import Build
from clip_rd_edge.settings.options import keywords_of
from clip_rd_edge.utils.files import require_utf8_path


@dataclass(frozen=True)
class BuiltBundle(os.PathLike[str]):
    """What a build has made. It is path-like: pass it wherever the path of a bundle is expected.

    Attributes:
        folder: the bundle's folder.
        verdict: how good it is, and what would help next, a sentence each.
        report: the page that compares it with teacher and student.
        held_out: the images held back, on which the figures were measured: a task for `evaluate`.
    """

    folder: Path
    verdict: tuple[str, ...]
    report: Path
    held_out: Path

    def __fspath__(self) -> str:
        return str(self.folder)


@keywords_of(Build)
def build(request: Build) -> BuiltBundle:
    """Build a bundle for a device from your own images: look at them, hold some back, distil, export, compare.

    Each stage keeps its result in `output`, and is skipped where nothing has changed: an interrupted call is continued
    by the same one, and another `target` trains nothing again.

    Raises:
        UsageError: `output` is in use or was built otherwise, or an option is invalid.
        InputError, ConfigError: the data, teacher, student or target is missing or invalid.
        InterruptedRunError: a signal stopped the build; its state was saved.
    """
    require_utf8_path(Path(request.output))

    from clip_rd_edge.benchmarking.plot import require_matplotlib

    require_matplotlib()

    from clip_rd_edge.benchmarking.report import HTML
    from clip_rd_edge.building.look import task_of
    from clip_rd_edge.building.stages import Building

    building = Building(request, partial(open_encoder, threads=1))
    lines = tuple(building())
    report, held_out = building.folder / "report" / HTML, task_of(building.folder, building.found, "test")
    return BuiltBundle(building.bundle, lines, report, held_out)
