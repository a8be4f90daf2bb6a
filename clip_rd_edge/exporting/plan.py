"""What an export writes: a plan for each target, complete, and checked before torch is imported.

Targets are described in `export/<name>/target.yaml`, with a README.md beside each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from clip_rd_edge.bundle.encoder import as_list
from clip_rd_edge.bundle.formats import Precision, format_named, import_named
from clip_rd_edge.bundle.manifest import is_bundle
from clip_rd_edge.bundle.runs import was_quantized_in_training
from clip_rd_edge.errors import InputError, UsageError, install_command, near_matches
from clip_rd_edge.runtime.labels import label_names
from clip_rd_edge.settings.deploying import Export, ExportLayout, Fallback, Via
from clip_rd_edge.utils.host import ONNXRUNTIMES, cuda_capability, installed_versions, jetson_name
from clip_rd_edge.utils.paths import as_text, is_folder, shipped_path
from clip_rd_edge.utils.structs import read_yaml

if TYPE_CHECKING:
    from clip_rd_edge.exporting.formats import Format

DEVICES = "export"
BROWSER = "browser"
_FILE = "target.yaml"
_RTX = "rtx"  # the target that covers all RTX_TARGETS
# Compute capabilities that TensorRT for RTX builds for on any machine.
RTX_TARGETS = {
    "sm75": "GeForce RTX 20, T4",
    "sm80": "A100",
    "sm86": "GeForce RTX 30, A10, RTX A",
    "sm89": "GeForce RTX 40, L4, RTX Ada",
    "sm120": "GeForce RTX 50, RTX PRO Blackwell",
    "sm121": "GB10 (DGX Spark)",
}
# Devices that build their engines themselves, and the software they need for it.
SELF_BUILDING_TARGETS = {
    "nvidia-gpu": "NVIDIA GPU with TensorRT 10 or 11",
    "jetson-orin": "Jetson Orin, compute capability 8.7; JetPack 6, TensorRT 10",
    "jetson-thor": "Jetson Thor, compute capability 11.0; JetPack 7, TensorRT 10.13",
}
TARGETS = {**RTX_TARGETS, **SELF_BUILDING_TARGETS}  # of TensorRT
# What people call boards that share a target with others.
_BOARDS = {
    **dict.fromkeys(("raspberry-pi", "raspberrypi", "rpi", "pi", "pi4", "pi5", "arm64"), "cpu-arm"),
    **dict.fromkeys(("x86", "intel", "amd", "pc", "cpu"), "cpu-x86"),
    **dict.fromkeys(("orin", "orin-nano", "jetson-nano", "jetson-orin-nano"), "jetson-orin"),
    **dict.fromkeys(("iphone", "ios", "mac", "apple"), "coreml"),
}
BUILD_SHELL = "build.sh"  # in a folder that builds its own engines


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The export settings of a target.

    Attributes:
        format: as `clip-rd-edge export` takes it; it also decides which runtime and candidates INT8 is tried with.
        precisions: those that the target supports; the first is the default.
        weight_bits: of INT8 weights. 8 is for targets whose processors all multiply bytes without saturation.
    """

    format: str
    precisions: tuple[Precision, ...]
    weight_bits: WeightBits = 7


class Target(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One target, as its YAML file describes it.

    Attributes:
        examples: products that it covers.
        needs, install: prerequisites, and the command that installs the runtime on it.
        precision: the recommended precision, with the reason.
        profile, export: the settings of `clip-rd-edge export --target`, and a command with them.
        runs: how far the project itself has tested it: `here` on such a machine, `nearby` on another one with the same
            software, `not yet`.
        proof: what exactly was tested and what was not, in one sentence.
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


def target_names() -> list[str]:
    return sorted(path.parent.name for path in shipped_path(DEVICES).glob(f"*/{_FILE}"))


def read_target(name: str) -> Target:
    return read_yaml(_folder(name) / _FILE, Target)


def target_guide(name: str) -> str:
    """Return the target's README.md as Markdown; raises as `read_target`."""
    return (_folder(name) / "README.md").read_text(encoding="utf-8")


def _folder(name: str) -> Path:
    _require_known(name, target_names())
    return shipped_path(DEVICES) / name


def _require_known(name: str, known: Sequence[str]) -> None:
    if name not in known:
        meant = _BOARDS.get(name.casefold())
        suggestion = f" Did you mean {meant!r}?" if meant else near_matches(name, known)
        raise InputError(
            f"No target is named {name!r}; expected one of {', '.join(known)}.{suggestion}",
            hint="clip-rd-edge targets describes each",
            option="target",
        )


# Bits of INT8 weights on CPUs. 7 is right on every processor; with 8, x86 processors without VNNI saturate (see
# `exporting.int8.saturation`).
WeightBits = Literal[7, 8]


@dataclass(frozen=True)
class Budget:
    """The accuracy that INT8 may cost.

    Attributes:
        image, text: min centred cosine with float32, per tower. The text tower has to agree more closely, because its
            embeddings are the classifier of every image.
        max_loss: max loss of a tower's zero-shot accuracy on the held-out pairs, in points, each image among all
            captions. Any rounding changes some answers in both directions; a loss within chance is accepted.
    """

    image: float = 0.99
    text: float = 0.995
    max_loss: float = 0.5

    def min_agreement(self, tower: str) -> float:
        """Return the min centred cosine of `image` or `text`."""
        return self.image if tower == "image" else self.text


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one target gets; what is not explained here is an option of `Export`.

    Attributes:
        target: as the user names it, or the target of engines that was found; empty for none.
        format, precision: of the towers; `bundle.formats` has the combinations.
        weight_bits: of INT8 weights that a CPU multiplies; TensorRT always uses 8.
        fallback: precision of a tower that INT8 does not improve. None: float32 if the other tower is in INT8; if
            neither is, the export is refused. `none` also refuses it for a single tower.
        note: how the target was chosen if none was named, in a sentence.
    """

    target: str = ""
    format: str = "onnx"
    precision: Precision = "fp32"
    layout: Literal[ExportLayout, "browser"] = "bundle"
    via: Via = "onnx"
    preprocess_in_graph: bool = False
    budget: Budget = Budget()
    weight_bits: WeightBits = 7
    fallback: Fallback | None = None
    search_minutes: float | None = None
    labels: tuple[str, ...] | None = None
    text_tower: bool = True
    threads: int = 1
    provenance: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def converter(self) -> Format:
        """What writes the format, imported when it is used."""
        converter: Format = import_named(format_named(self.format).converter)()
        return converter

    @property
    def in_batches(self) -> bool:
        """Whether clients run INT8 on several inputs at once, whatever a manifest records for a tower."""
        return self.layout == "huggingface"

    def adapts(self, tower: str) -> bool:
        """Return whether roundings in INT8 are chosen by what the layers of `image` or `text` see.

        An image tower that was trained under the rounding to the nearest level has adapted itself to that.
        """
        return tower == "text" or "quantize" not in self.provenance


def plan_exports(request: Export) -> tuple[Plan, ...]:
    """Plan the export for each target in `target`, a list or separated by commas; one plan if there is at most one."""
    given = [] if request.target is None else as_list(request.target)
    names: list[str | None] = [name.strip() for text in given for name in text.split(",")]
    if is_bundle(Path(request.model)) and names != [BROWSER]:
        raise UsageError(f"{request.model} is already a bundle.", hint="pass the model that it was exported from")
    plans = tuple(_plan(request, name) for name in dict.fromkeys(names or [None]))
    for plan in plans:
        for option, reason in _conflicts(request, plan, plans):
            raise UsageError(f"{{{option}}} cannot be used here: {reason}.", hint=f"omit {{{option}}}", option=option)
    return plans


_AS_REQUESTED = ("via", "preprocess_in_graph", "fallback", "search_minutes", "text_tower", "threads")


def _plan(request: Export, name: str | None) -> Plan:
    """Return the plan of one target, with what follows from the target filled in."""
    note = ""
    if name is None and request.format == "trt":
        name, note = engine_target_here()
    profile = _profile(request, name)
    precision = request.precision or profile.precisions[0]
    choices: tuple[tuple[str, str | None, Sequence[str]], ...] = (
        ("format", request.format, (profile.format,)),
        ("precision", precision, profile.precisions),
    )
    for option, value, known in choices:
        if value not in (None, *known):
            raise UsageError(
                f"{name or profile.format} takes {{{option}}} {' or '.join(known)}, not {value}.",
                hint=f"choose one of them, or omit {{{option}}}",
                option=option,
            )
    labels = label_names(request.labels)
    low, loss = request.min_agreement, request.max_loss
    limits = {"image": low, "text": low, "max_loss": loss}
    provenance = {
        "model": as_text(request.model), "pretrained": as_text(request.pretrained), **package_versions(),
        "device": name if request.target else None,
        "quantize": "int8" if was_quantized_in_training(str(as_text(request.model))) else None,
    }  # fmt: skip
    return Plan(
        target=name or "",
        format=profile.format,
        precision=precision,
        layout="browser" if name == BROWSER and request.layout == "bundle" else request.layout,
        budget=Budget(**{name: limit for name, limit in limits.items() if limit is not None}),
        # The other layouts cannot name the processors that a file is for.
        weight_bits=profile.weight_bits if request.layout == "bundle" else 7,
        labels=None if labels is None else tuple(labels),
        provenance={key: value for key, value in provenance.items() if value},
        note=note,
        **{name: getattr(request, name) for name in _AS_REQUESTED},
    )


def _profile(request: Export, name: str | None) -> Profile:
    """Return the profile of a target, or that of a format without one."""
    if name is None:
        format = request.format or "onnx"
        return Profile(format=format, precisions=format_named(format).precisions)
    _require_known(name, [*(name for name in target_names() if name != _RTX), *RTX_TARGETS])
    return read_target(_RTX if name in RTX_TARGETS else name).profile


def _conflicts(request: Export, plan: Plan, plans: tuple[Plan, ...]) -> Iterator[tuple[str, str]]:
    """Yield the options that something else in a request rules out, each with the reason."""
    info, layout = format_named(plan.format), plan.layout
    other, int8 = layout != "bundle", plan.precision == "int8"
    no_int8 = "it is for {precision} int8" if all(plan.precision != "int8" for plan in plans) else ""
    in_graph = "the programs that read it preprocess images themselves" if other else ""
    if plan.format not in ("onnx", "openvino"):
        in_graph = f"{info.title} takes images of one size"
    engines = "TensorRT's INT8 falls back to FP16 per layer" if int8 and plan.format == "trt" else ""
    converted = "the model is a bundle already" if is_bundle(Path(request.model)) else ""
    absent = int8 and request.fallback not in (None, "none", *info.precisions)
    folder = layout in ("huggingface", "immich")
    images = request.calibration is not None and is_folder(request.calibration)
    for is_given, option, reason in (
        (other and len(plans) > 1, "target", f"the layout {layout} is for one target" if other else ""),
        (other and plan.format != "onnx", "layout", f"{layout} is ONNX, not {plan.format}"),
        (plan.target == BROWSER and layout != BROWSER, "layout", "the target browser has its own"),
        (folder and not plan.text_tower, "text_tower", f"the layout {layout} has both towers"),
        (folder and request.labels is not None, "labels", f"the layout {layout} stores no labels"),
        (request.preprocess_in_graph, "preprocess_in_graph", in_graph),
        (request.as_name is not None, "as_name", "" if layout == "immich" else "it is for {layout} immich"),
        (request.texts is not None and not images, "texts", "it needs {calibration} FOLDER"),
        (request.report is not None, "report", "" if layout == "huggingface" else "it is for {layout} huggingface"),
        (request.via != "onnx" and plan.format != "trt", "via", "it builds TensorRT engines: {format} trt"),
        (request.via != "onnx" and int8, "via", "INT8's Q/DQ nodes are in the ONNX"),
        (absent, "fallback", f"{info.title} is exported in {', '.join(info.precisions)}"),
        *((getattr(request, name) is not None, name, engines) for name in ("fallback", "max_loss", "search_minutes")),
        *(
            (getattr(request, name) is not None, name, no_int8)
            for name in ("texts", "min_agreement", "max_loss", "fallback", "search_minutes")
        ),
        *(
            (is_given, name, converted)
            for name, is_given in {
                "pretrained": request.pretrained is not None, "precision": request.precision is not None,
                "calibration": request.calibration is not None, "text_tower": not request.text_tower,
            }.items()
        ),
    ):  # fmt: skip
        if is_given and reason:
            yield option, reason


def package_versions() -> dict[str, str]:
    """Return the versions of the installed packages that an export depends on, for its provenance."""
    return installed_versions(("clip-rd-edge", "torch", "open_clip_torch", "onnx", *ONNXRUNTIMES, "pillow"))


def engine_target_here() -> tuple[str, str]:
    """Return the target for engines if none was named, and a sentence about this and how to go on.

    It is the GPU of this machine if engines for it can be built now, by TensorRT for RTX; and otherwise a folder that
    builds its own engines: for this Jetson, or for any NVIDIA GPU.
    """
    if jetson := jetson_name():
        return jetson, f"no --target: the folder is for this {SELF_BUILDING_TARGETS[jetson]}; run its build.sh next"
    capability = cuda_capability()
    target = f"sm{capability.replace('.', '')}"
    if target in RTX_TARGETS and find_spec("tensorrt_rtx_bindings"):
        return target, f"no --target: the engines are for the GPU here, {target} ({RTX_TARGETS[target]})"
    return "nvidia-gpu", (
        f"no --target, and {f'the GPU here is {target}' if capability else 'no NVIDIA GPU here'}: the folder builds "
        "its own engines on any, by TensorRT; copy it there and run bash build.sh, or python3 build.py (with TensorRT "
        f"for RTX, --target sm89 builds those of an RTX card here: {install_command('rtx')})"
    )
