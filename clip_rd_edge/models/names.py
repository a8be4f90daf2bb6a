"""What models are called, wherever one is named: to train, to learn from, to load, export, evaluate and compare.

    a folder, local-dir:PATH, hf-hub:ORG/REPO     a trained model; of a run, its student
    NAME@TAG, NAME@FILE                           open_clip's architecture with published weights, or a file's
    a preset, a timm name, a JSON file            the image tower of a new student
    open_clip:NAME                                the image tower of open_clip's architecture, for a new student

A student that is named by a trained model is fine-tuned. All else needs a trained model. No torch is imported here.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

from clip_rd_edge.bundle.manifest import is_bundle
from clip_rd_edge.bundle.runs import LOCAL_DIR, model_folder
from clip_rd_edge.errors import UsageError
from clip_rd_edge.utils.paths import exists, is_file

CONFIGS = Path(__file__).parent / "configs"
OPEN_CLIP, HUB, TAG_MARK = "open_clip:", "hf-hub:", "@"


class ModelName(NamedTuple):
    """A name, taken apart.

    Attributes:
        kind: `trunk` is timm's, or any name that is nothing else.
        name: of a folder, the one that holds the model; of the hub, with its prefix; of others, without one.
        weights: tag or file, of open_clip's architecture.
    """

    kind: Literal["folder", "bundle", "hub", "open_clip", "preset", "file", "trunk"]
    name: str
    weights: str | None = None

    @property
    def is_trained(self) -> bool:
        return self.kind in ("folder", "bundle", "hub") or self.weights is not None


def parse_name(text: str, *, weights: str | None = None) -> ModelName:
    """Return what a text names; nothing is fetched, and an architecture need not exist.

    Args:
        weights: tag or file, for an architecture that is named without.
    """
    named = _parse(text)
    if weights is None:
        return named
    if named.is_trained:
        raise UsageError(
            f"{text} has weights of its own; pretrained, {weights!r}, is only for an architecture.",
            hint="omit it, or name the architecture in place of the model",
        )
    return ModelName("open_clip", text.removeprefix(OPEN_CLIP), weights)


def _parse(text: str) -> ModelName:
    if text and is_bundle(path := Path(text.removeprefix(LOCAL_DIR))):
        return ModelName("bundle", str(path))
    if (folder := model_folder(text)) is not None:
        return ModelName("folder", str(folder))
    if text.startswith(HUB):
        return ModelName("hub", text)
    name, mark, weights = text.removeprefix(OPEN_CLIP).partition(TAG_MARK)
    if mark and not exists(text):
        return ModelName("open_clip", name, weights)
    if text.startswith(OPEN_CLIP):
        return ModelName("open_clip", name)
    if text.endswith(".json") and is_file(Path(text)):
        return ModelName("file", text)
    return ModelName("preset" if text in preset_names() else "trunk", text)


def is_trained(text: str) -> bool:
    return parse_name(text).is_trained


def student_file(text: str) -> Path | None:
    """Return the JSON file that a new student is named by; None for other names."""
    named = parse_name(text)
    return Path(named.name) if named.kind == "file" else None


def preset_names() -> list[str]:
    """Return the names of image towers that are known to work; any other of timm is accepted, too."""
    return sorted(path.stem for path in CONFIGS.glob("*.json"))


def architectures() -> list[str]:
    """Return the names of open_clip's architectures."""
    package = find_spec("open_clip")
    folders = package.submodule_search_locations if package else None
    return sorted(path.stem for folder in folders or () for path in Path(folder).glob("model_configs/*.json"))
