"""One module per format, imported when it is used. A format of another package is a subclass of `Format`, too."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from clip_rd_edge.bundle.formats import format_named
from clip_rd_edge.bundle.manifest import Manifest, Tower
from clip_rd_edge.errors import MissingExtraError
from clip_rd_edge.exporting.parity import Inputs, NodeByNode, hard_inputs
from clip_rd_edge.exporting.plan import Plan
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.utils.text import SILENT, PrefixedReporter, Reporter

if TYPE_CHECKING:
    from clip_rd_edge.exporting.calibration import CalibrationSet
    from clip_rd_edge.exporting.int8.trials import Trial
    from clip_rd_edge.models.clip import ClipModel


class Converted(NamedTuple):
    """The manifest of a converted bundle, not yet written, and the INT8 candidates that were measured for it."""

    manifest: Manifest
    trials: tuple[Trial, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Job:
    """A plan that is carried out for a model.

    Attributes:
        source: the model's float32 bundle, in ONNX, with both towers.
        fp32: the manifest of `source`.
        samples: calibrate and evaluate INT8; None for other precisions.
    """

    plan: Plan
    clip: ClipModel
    source: Path
    fp32: Manifest
    folder: Path
    samples: CalibrationSet | None = None
    reporter: Reporter = SILENT

    @property
    def manifest(self) -> Manifest:
        """The manifest of the float32 towers that are converted: without a text tower if the plan leaves it out."""
        return self.fp32 if self.plan.text_tower else self.fp32.without_text()

    @cached_property
    def inputs(self) -> dict[str, Inputs]:
        """Inputs of both towers, by name, that produce the largest values that they will meet."""
        return hard_inputs(self.source, self.fp32)

    def convert_towers(self, convert: Callable[[str, Tower], Tower], *, doing: str, target: str = "") -> Converted:
        """Convert each tower, by its name and its entry in the manifest.

        Args:
            doing: what is done to a tower, for the reporter.
            target: of the result's manifest; empty leaves it as it is.
        """
        towers = {}
        for name, tower in self.manifest.towers.items():
            self.reporter_of(name).update(doing)
            towers[name] = convert(name, tower)
        return Converted(self.manifest.with_towers(towers, target=target or None))

    def reporter_of(self, tower: str) -> Reporter:
        return PrefixedReporter(self.reporter, f"{tower} tower: ")


class Format(ABC):
    """Converts a model's float32 bundle to a format, by some packages that an extra of this one installs."""

    packages: tuple[str, ...] = ()
    extra = ""

    def check(self, plan: Plan) -> None:
        """Raise a ClipRdEdgeError if a plan cannot be carried out here, such as for want of a package."""
        for package in self.packages:
            if find_spec(package.replace("-", "_")) is None:
                purpose = f"Exporting for {format_named(plan.format).title}"
                raise MissingExtraError(package, extra=self.extra, purpose=purpose)

    @abstractmethod
    def convert(self, job: Job) -> Converted:
        """Write the towers into the job's folder, which has the tokenizer already."""

    def reference(self, folder: Path, manifest: Manifest) -> BundleEncoder:
        """Return an encoder that computes a bundle's reference embeddings, as equal on all processors as possible."""
        return NodeByNode(folder, manifest)

    def runnable(self, job: Job) -> Path:
        """Return the bundle that embeds labels and reference inputs here: the job's folder, or its float32 source."""
        return job.folder
