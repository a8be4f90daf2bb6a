"""Targets: what a bundle runs on, as data in `export/<name>/device.yaml`, with a README.md beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from clip_rd_edge.errors import InputError, near_matches
from clip_rd_edge.utils.io import read_yaml, shipped

DEVICES = "export"
_FILE = "device.yaml"


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is exported for a target.

    Attributes:
        format: of `clip-rd-edge export`; it decides by which runtime INT8 is tried, and in which ways.
        precisions: that the target takes, the one to try first in front.
    """

    format: Literal["onnx", "openvino", "trt"]
    precisions: tuple[Literal["fp32", "fp16", "bf16", "int8"], ...]


class Device(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One target.

    Attributes:
        title: what it is, in a few words.
        examples: products that are meant.
        needs: what has to be there before anything is installed.
        install: the command that installs what runs a bundle there.
        precision: what to export for it, with the reason.
        profile: the same for `clip-rd-edge export --target`.
        export: the command that makes the bundle.
        runs: what of this has been run by the project itself: `here` on such a machine, `nearby` on another that
            shares the software, `not yet`.
        proof: what exactly was run and what was not, in one sentence.
    """

    title: str
    examples: str
    needs: tuple[str, ...]
    install: str
    precision: str
    profile: Profile
    export: str
    runs: Literal["here", "nearby", "not yet"]
    proof: str


def device_names() -> list[str]:
    """Names of the targets that are shipped, sorted."""
    return sorted(path.parent.name for path in shipped(DEVICES).glob(f"*/{_FILE}"))


def read_device(name: str) -> Device:
    """The target of that name.

    Raises:
        InputError: there is none.
        ConfigError: its file does not fit.
    """
    return read_yaml(_folder(name) / _FILE, Device)


def device_guide(name: str) -> str:
    """What its README.md says, as Markdown; raises as `read_device`."""
    return (_folder(name) / "README.md").read_text(encoding="utf-8")


def _folder(name: str) -> Path:
    known = device_names()
    if name not in known:
        raise InputError(
            f"There is no device {name!r}; there are {', '.join(known)}.{near_matches(name, known)}",
            hint="clip-rd-edge devices lists them",
        )
    return shipped(DEVICES) / name
