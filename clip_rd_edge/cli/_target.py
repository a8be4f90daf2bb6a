"""What `--target` means: a device's profile, or what an engine is built for."""

from __future__ import annotations

from dataclasses import dataclass

from clip_rd_edge.contract.device import device_names, read_device
from clip_rd_edge.errors import InputError, UsageError, near_matches
from clip_rd_edge.exporters.formats import Format, Precision, require_fit
from clip_rd_edge.exporters.tensorrt import RTX_TARGETS, TARGETS, require_target

_RTX = "rtx"  # the device that all of RTX_TARGETS are


@dataclass(frozen=True)
class Aim:
    """What is exported; `engine` is what TensorRT engines are for, or None."""

    format: Format
    precision: Precision
    engine: str | None


def aim_at(target: str | None, *, format: Format | None, precision: Precision | None) -> Aim:
    """What the options say together; what they leave open is the target's first choice, else ONNX in float32.

    Raises:
        InputError: there is no target of that name, or an engine's is missing.
        UsageError: the target takes no such format or precision, or the format no such precision.
    """
    if target is None:
        format = format or "onnx"
        if format == "trt":
            require_target(target)
        require_fit(format, precision or "fp32")
        return Aim(format, precision or "fp32", None)
    if target not in (*device_names(), *RTX_TARGETS):
        known = [*(name for name in device_names() if name != _RTX), *RTX_TARGETS]
        raise InputError(
            f"There is no target {target!r}; there are {', '.join(known)}.{near_matches(target, known)}",
            hint="clip-rd-edge devices says what each is",
        )
    profile = read_device(_RTX if target in RTX_TARGETS else target).profile
    if format not in (None, profile.format):
        raise UsageError(
            f"{target} takes --format {profile.format}, not {format}.", hint="leave --format away, or --target"
        )
    if profile.format == "trt":
        require_target(target)
    if precision is not None and precision not in profile.precisions:
        raise UsageError(f"{target} takes --precision {' or '.join(profile.precisions)}, not {precision}.")
    return Aim(profile.format, precision or profile.precisions[0], target if target in TARGETS else None)
