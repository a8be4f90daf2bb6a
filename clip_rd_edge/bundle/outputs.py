"""What an output may replace: an earlier one of the same kind, a folder only with `--force`, and nothing else.

A folder is recognised by the files that every such output has, and refused if it holds any file that none of them has:
a list of labels that somebody put into a bundle's folder is not lost.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple

from clip_rd_edge.bundle.manifest import ENGINE_SUFFIX, MANIFEST, STAMP_SUFFIX, listed_files
from clip_rd_edge.bundle.runs import CONFIG_FILE, DISTILLATION_FILE, TRANSFORMERS_CONFIG, WEIGHTS_FILE
from clip_rd_edge.errors import ConfigError, InputError, UsageError
from clip_rd_edge.utils.files import named_failures
from clip_rd_edge.utils.outputs import require_apart, require_free_output
from clip_rd_edge.utils.paths import exists, is_file, is_folder, is_left_by_system
from clip_rd_edge.utils.structs import read_json

OutputKind = Literal["export", "average", "stitched model", "trimmed model"]


class _Layout(NamedTuple):
    """Files by their paths in the folder, in which * also stands for a /: those that it must have, and may have."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


_TOKENIZER_FILES = (
    "added_tokens.json", "chat_template.jinja", TRANSFORMERS_CONFIG, "merges.txt", "special_tokens_map.json", "*.model",
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip
_MODEL = _Layout((CONFIG_FILE, WEIGHTS_FILE, DISTILLATION_FILE), _TOKENIZER_FILES)
_EXPORTS = (  # beside bundles, whose manifests say what is in them
    _Layout(("index.html", "sizes.json", f"bundle/{MANIFEST}"), ("*.js", "style.css", "icon.svg", "npm/*")),  # browser
    _Layout(
        ("config.json", "visual/model.onnx", "textual/model.onnx"),  # immich
        ("visual/preprocess_cfg.json", "textual/tokenizer.json", "textual/tokenizer_config.json"),
    ),
    _Layout(
        (CONFIG_FILE, WEIGHTS_FILE, "onnx/model.onnx", "preprocessor_config.json"),  # huggingface
        (*_TOKENIZER_FILES, DISTILLATION_FILE, "config.*.json", "onnx/*.onnx", "README.md", "accuracy-latency.png"),
    ),
)
_BUILT_ON_DEVICE = (f"*{ENGINE_SUFFIX}", f"*{ENGINE_SUFFIX}{STAMP_SUFFIX}", f"*{ENGINE_SUFFIX}.part", "timing.cache")
# The entry of distillation.json that only the command's own models have: a student took days to train.
_RECORDED = {"average": "average", "stitched model": "classifier", "trimmed model": "trimmed"}


def require_output(path: Path, kind: OutputKind, *, overwrite: bool, sources: Iterable[Path] = ()) -> None:
    """Refuse an output in use, unless with `overwrite` it is an earlier one of `kind` alone, and no source."""
    with named_failures(path):
        names = sorted(child.name for child in path.iterdir()) if is_folder(path) else []
        stray = "" if is_file(path) else _stray(path, kind) if names else None
    require_apart(path, sources)
    if stray is not None:
        other = f"it is not an earlier {kind}{f': it holds {names[0]}' if names else ''}"
        found = f"beside an earlier {kind}, it holds {stray}" if stray else other
        raise UsageError(
            f"The output {path} exists and is not replaced: {found}.",
            hint=f"choose another {{output}}, or move {stray or 'it'} elsewhere",
        )
    require_free_output(path, overwrite=overwrite)


def require_output_file(path: Path, is_earlier: Callable[[bytes], bool], *, what: str, option: str) -> None:
    """Refuse a file that is in use, unless it is an earlier output of the same kind.

    Args:
        is_earlier: recognises such an output by its first 4,096 bytes.
        what: such an output, in the error.
        option: that names the file, in the hint.
    """
    if not exists(path):
        return
    beginning = b""
    if is_file(path):
        with named_failures(path, hint=f"choose another {option}"), path.open("rb") as file:
            beginning = file.read(4096)
        if not beginning or is_earlier(beginning):
            return
    raise UsageError(
        f"The file {path} is not replaced: it exists, and is not {what}.",
        hint=f"choose another {option}, or remove that file yourself",
    )


def _stray(folder: Path, kind: OutputKind) -> str | None:
    """Return a file that does not belong to an earlier output, or None; empty if the folder is not one at all."""
    if kind != "export":
        return _outside(folder, _MODEL) if _RECORDED[kind] in _record(folder) else ""
    if (layout := _bundle_layout(folder)) is not None:
        return _outside(folder, layout)
    targets = [child for child in sorted(folder.iterdir()) if _bundle_layout(child) is not None]
    if targets and folder / "bundle" not in targets:
        others = (child.name for child in sorted(folder.iterdir()) if child not in targets)
        within = (f"{target.name}/{name}" for target in targets if (name := _stray(target, kind)))
        return next(others, None) or next(within, None)
    for layout in _EXPORTS:
        if all(is_file(folder / name) for name in layout.required):
            part = _bundle_layout(folder / "bundle")
            inside = tuple(f"bundle/{name}" for name in part.optional) if part else ()
            return _outside(folder, _Layout(layout.required, (*layout.optional, *inside)))
    return ""


def _bundle_layout(folder: Path) -> _Layout | None:
    """Return what a bundle's folder may hold, by its manifest; None for other folders, such as those of web pages."""
    listed = listed_files(folder)
    if listed is None:
        return None
    return _Layout((MANIFEST,), (MANIFEST, *map(glob.escape, listed), *_BUILT_ON_DEVICE))


def _record(folder: Path) -> dict[str, Any]:
    with suppress(InputError, ConfigError):
        return read_json(folder / DISTILLATION_FILE, dict[str, Any])
    return {}


def _outside(folder: Path, layout: _Layout) -> str | None:
    patterns = (*layout.required, *layout.optional)
    files = (path for path in folder.rglob("*") if not path.is_dir() and not is_left_by_system(path))
    paths = (path.relative_to(folder).as_posix() for path in files)
    return next((path for path in paths if not any(fnmatchcase(path, pattern) for pattern in patterns)), None)
