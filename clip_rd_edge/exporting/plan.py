"""What an export writes. Targets are described in `export/<name>/target.yaml`, with a README.md beside each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import Literal, TypedDict, get_args

import msgspec

from clip_rd_edge.bundle.encoder import as_list
from clip_rd_edge.bundle.formats import FORMATS, Format, Precision
from clip_rd_edge.errors import InputError, UsageError, near_matches, require_known_options
from clip_rd_edge.installation import install_command
from clip_rd_edge.runtime.labels import Labels, label_names
from clip_rd_edge.utils.host import cuda_capability, jetson_name
from clip_rd_edge.utils.paths import shipped_path
from clip_rd_edge.utils.structs import read_yaml

# Precision of a tower that INT8 does not improve; `none` refuses the export.
Fallback = Literal["fp32", "fp16", "none"]
# Bits of INT8 weights on CPUs. 7 is right on every processor; with 8, x86 processors without VNNI saturate (see
# `exporting.int8.saturation`).
WeightBits = Literal[7, 8]
# How TensorRT engines are built.
Via = Literal["onnx", "torch-tensorrt"]
# What is written: a bundle, or a folder for other programs.
Layout = Literal["bundle", "huggingface", "immich"]


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


class ExportRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The parameters of one export.

    Attributes:
        precision, format: a supported combination; see `require_precision`.
        target: target of the TensorRT engines, one of `targets.TARGETS`, or empty.
        via: how engines are built: from ONNX without a GPU, or by torch-tensorrt on this machine's GPU.
        preprocess_in_graph: the image tower takes bytes of any size, and resizes, crops and normalises them itself.
        budget: the accuracy that INT8 may cost.
        weight_bits: of INT8 weights that a CPU multiplies; TensorRT always uses 8.
        fallback: precision of a tower that INT8 does not improve. None: float32 if the other tower is in INT8; if
            neither is, the export is refused. `none` also refuses it for a single tower.
        labels: names for a label bank, so that a device with fixed labels needs no text tower; None for no bank.
        text_tower: False leaves the text tower and the tokenizer out.
        in_batches: the clients run INT8 on several inputs at once, whatever the manifest says of a tower.
        threads: number of threads when measuring latency.
        provenance: where the model comes from, for the manifest.
    """

    precision: Precision = "fp32"
    format: Format = "onnx"
    target: str = ""
    via: Via = "onnx"
    preprocess_in_graph: bool = False
    budget: Budget = Budget()
    weight_bits: WeightBits = 7
    fallback: Fallback | None = None
    labels: tuple[str, ...] | None = None
    text_tower: bool = True
    in_batches: bool = False
    threads: int = 1
    provenance: dict[str, str] = {}

    def adapts(self, tower: str) -> bool:
        """Return whether roundings in INT8 are chosen by what the layers of `image` or `text` see.

        An image tower that was trained under the rounding to the nearest level has adapted itself to that.
        """
        return tower == "text" or "quantize" not in self.provenance


class ExportOptions(TypedDict, total=False):
    """The options of `clip_rd_edge.export` and the command line, before defaults and the target's profile apply.

    Keys:
        format: one of `bundle.formats.FORMATS`. Default: the target's, else onnx.
        precision: `fp32`, `fp16`, `bf16` or `int8`. Default: the target's, else fp32.
        target: a target's name, an RTX card's capability such as `sm86`, or `browser`; or several devices, in a list
            or separated by commas. Default for `trt`: the GPU that is here, else a folder that builds its engines on
            any.
        via: `onnx` or `torch-tensorrt`.
        layout: `bundle`; `huggingface` for a folder that open_clip, transformers.js and fastembed load; or `immich`
            for a model folder of immich.
        as_name: for `immich`, the model that immich knows by this name and whose place the student takes. Default:
            `ViT-B-32__openai` for embeddings of 512 numbers, and others for 640, 768 and 1,024.
        report: folder of a benchmark's report, whose figures `huggingface` puts into the model card.
        preprocess_in_graph: image.onnx takes uint8 RGB of any size, one image at a time.
        labels: names, or a label file, whose embeddings are stored in the bundle. Default: the model's own, which those
            that `stitch` writes have.
        text_tower: False leaves the text tower out: the bundle embeds images, and classifies among `labels` alone.
            Default: True.
        calibration: pairs to calibrate INT8 on, in any form that `distill` takes data. Default: those that
            the model's run has kept.
        node_modules: where npm has installed the packages for the browser. Default: downloaded once.
        min_agreement: min centred cosine between the embeddings in INT8 and in float32. Default: see `Budget`.
        max_loss: max loss of zero-shot accuracy by INT8 on held-out pairs, in points. Default: see `Budget`.
        fallback: precision of a tower that INT8 does not improve: `fp32`, `fp16` or `none`.
        threads: number of threads when measuring latency. Default: 1.
    """

    format: Format | None
    precision: Precision | None
    target: str | Sequence[str] | None
    via: Via
    layout: Layout
    as_name: str | None
    report: str | os.PathLike[str] | None
    preprocess_in_graph: bool
    labels: Labels
    text_tower: bool
    calibration: str | os.PathLike[str] | None
    node_modules: str | os.PathLike[str] | None
    min_agreement: float | None
    max_loss: float | None
    fallback: Fallback | None
    threads: int


def require_precision(format: Format, precision: Precision) -> None:
    """Raise UsageError if a format does not support a precision."""
    precisions = FORMATS[format].precisions
    if precision not in precisions:
        raise UsageError(
            f"{format} does not support {precision}; expected {', '.join(precisions)}.",
            hint=f"choose one of them: {{precision}} {precisions[0]}",
        )


def require_fallback(fallback: Fallback | None, *, format: Format, precision: Precision) -> None:
    """Raise UsageError if a tower that INT8 does not improve cannot have this precision in a format."""
    info = FORMATS[format]
    if precision == "int8" and fallback not in (None, "none", *info.precisions):
        raise UsageError(
            f"{{fallback}} {fallback} does not work with {info.title}, which is exported in "
            f"{', '.join(info.precisions).upper()}.",
            hint="use {fallback} fp32",
        )


def require_via(via: Via, *, format: Format, precision: Precision) -> None:
    """Raise UsageError if engines cannot be built this way in a format and precision."""
    if via == "torch-tensorrt" and format != "trt":
        raise UsageError(f"{{via}} torch-tensorrt builds TensorRT engines; expected {{format}} trt, not {format}.")
    if via == "torch-tensorrt" and precision == "int8":
        raise UsageError(
            "{via} torch-tensorrt does not support INT8, because its Q/DQ nodes are in the ONNX.",
            hint="use {precision} fp16, or omit {via}",
        )


def require_int8(options: ExportOptions, precisions: Sequence[Precision]) -> None:
    """Raise UsageError if an option is for INT8, and none of the targets, whose precisions are given, is in INT8."""
    if "int8" in precisions:
        return
    for name in ("calibration", "min_agreement", "max_loss", "fallback"):
        if options.get(name) is not None:
            option = f"{{{name}}}"
            raise UsageError(
                f"{option} is for {{precision}} int8, not {precisions[0]}.",
                hint=f"omit {option}, or export with --precision int8",
            )


def require_unconverted(bundle: Path, options: ExportOptions, pretrained: str | None) -> None:
    """Raise UsageError if an option would have to be applied before `bundle` was exported."""
    fixed = {
        "pretrained": pretrained is not None,
        "precision": options.get("precision") is not None,
        "calibration": options.get("calibration") is not None,
        "text_tower": not options.get("text_tower", True),
    }
    for name, is_given in fixed.items():
        if is_given:
            raise UsageError(
                f"{bundle} is a bundle already; {{{name}}} cannot change it.", hint=f"run the export without {{{name}}}"
            )


def int8_budget(options: ExportOptions, *, precision: Precision, format: Format) -> Budget:
    """Return the accuracy that the options allow INT8 to cost."""
    min_agreement, max_loss = options.get("min_agreement"), options.get("max_loss")
    _require_within("{min_agreement}", min_agreement, 1)
    _require_within("{max_loss}", max_loss, 100)
    fallback = options.get("fallback")
    if precision == "int8" and format == "trt" and (fallback or max_loss is not None):
        name = "{fallback}" if fallback else "{max_loss}"
        raise UsageError(f"{name} is for ONNX Runtime and OpenVINO; TensorRT's INT8 falls back to FP16 per layer.")
    default = Budget()
    return Budget(
        image=default.image if min_agreement is None else min_agreement,
        text=default.text if min_agreement is None else min_agreement,
        max_loss=default.max_loss if max_loss is None else max_loss,
    )


def _require_within(option: str, value: object, highest: int) -> None:
    """Raise UsageError if an option is given and is no number from 0 to `highest`; NaN would switch its check off."""
    if value is not None and not (isinstance(value, Real) and 0 <= float(value) <= highest):
        raise UsageError(
            f"{option} is {value!r}; expected a number from 0 to {highest}.",
            hint=f"correct it, or omit {option} for its default",
        )


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
# Those for which its builder computes Q/DQ layers in another type, so that an INT8 engine never passes its check.
RTX_WITHOUT_INT8 = ("sm75",)
# Devices that build their engines themselves, and the software they need for it.
SELF_BUILDING_TARGETS = {
    "nvidia-gpu": "NVIDIA GPU with TensorRT 10 or 11",
    "jetson-orin": "Jetson Orin, compute capability 8.7; JetPack 6, TensorRT 10",
    "jetson-thor": "Jetson Thor, compute capability 11.0; JetPack 7, TensorRT 10.13",
}
TARGETS = {**RTX_TARGETS, **SELF_BUILDING_TARGETS}
BUILD_SHELL = "build.sh"  # in a folder that builds its own engines


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The export settings of a target.

    Attributes:
        format: as `clip-rd-edge export` takes it; it also decides which runtime and candidates INT8 is tried with.
        precisions: those that the target supports; the first is the default.
        weight_bits: of INT8 weights. 8 is for targets whose processors all multiply bytes without saturation.
    """

    format: Format
    precisions: tuple[Precision, ...]
    weight_bits: WeightBits = 7


class Target(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One target.

    Attributes:
        title: what it is, in a few words.
        examples: products that it covers.
        needs: prerequisites, before anything is installed.
        install: the command that installs the runtime on it.
        precision: the recommended precision, with the reason.
        profile: the settings of `clip-rd-edge export --target`.
        export: the command that makes the bundle.
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
    """Return the names of the shipped targets, sorted."""
    return sorted(path.parent.name for path in shipped_path(DEVICES).glob(f"*/{_FILE}"))


def read_target(name: str) -> Target:
    """Read the target called `name`."""
    return read_yaml(_folder(name) / _FILE, Target)


def target_guide(name: str) -> str:
    """Return the target's README.md as Markdown; raises as `read_target`."""
    return (_folder(name) / "README.md").read_text(encoding="utf-8")


def _folder(name: str) -> Path:
    known = target_names()
    if name not in known:
        raise InputError(
            f"No target is named {name!r}; expected one of {', '.join(known)}.{near_matches(name, known)}",
            hint="clip-rd-edge targets lists them",
        )
    return shipped_path(DEVICES) / name


@dataclass(frozen=True)
class ResolvedTarget:
    """The format and precision of an export.

    Attributes:
        engine_target: the target of TensorRT engines, or None.
        note: how the target was chosen if none was named, in a sentence, or empty.
    """

    format: Format
    precision: Precision
    engine_target: str | None
    weight_bits: WeightBits = 7
    note: str = ""


def resolve_target(target: str | None, *, format: Format | None, precision: Precision | None) -> ResolvedTarget:
    """Combine the options; the defaults are the target's first choice, or ONNX in float32 without a target.

    Engines without a target are for the GPU that is here, or built where they run (`engine_target_here`).
    """
    if target is None:
        if format == "trt":
            target, note = engine_target_here()
            resolved = resolve_target(target, format=format, precision=precision)
            return replace(resolved, note=note)
        format = format or "onnx"
        require_precision(format, precision or "fp32")
        return ResolvedTarget(format, precision or "fp32", None)
    if target not in (*target_names(), *RTX_TARGETS):
        known = [*(name for name in target_names() if name != _RTX), *RTX_TARGETS]
        raise InputError(
            f"No target is named {target!r}; expected one of {', '.join(known)}.{near_matches(target, known)}",
            hint="clip-rd-edge targets describes each",
        )
    profile = read_target(_RTX if target in RTX_TARGETS else target).profile
    if format not in (None, profile.format):
        raise UsageError(f"{target} takes {{format}} {profile.format}, not {format}.", hint="omit {format} or {target}")
    if profile.format == "trt":
        require_target(target)
    if precision is not None and precision not in profile.precisions:
        raise UsageError(f"{target} takes {{precision}} {' or '.join(profile.precisions)}, not {precision}.")
    return ResolvedTarget(
        profile.format,
        precision or profile.precisions[0],
        target if target in TARGETS else None,
        weight_bits=profile.weight_bits,
    )


@dataclass(frozen=True)
class ExportPlan:
    """The checked options of an export, with defaults filled in.

    Attributes:
        request: the parameters of the export, without provenance.
        layout: what is written: one of the layouts, or a page for the browser.
        device: the target as the user named it, or empty.
        note: how the target was chosen if none was named, in a sentence, or empty.
    """

    request: ExportRequest
    layout: Literal[Layout, "browser"]
    device: str = ""
    note: str = ""


def plan_exports(options: ExportOptions) -> tuple[ExportPlan, ...]:
    """Plan the export for each target in `target`, a list or separated by commas; one plan if there is at most one."""
    require_known_options(options, ExportOptions.__annotations__, command="export")
    _require_names(options)
    target = options.get("target")
    names = [] if target is None else [name.strip() for text in as_list(target) for name in text.split(",")]
    if len(names) > 1:
        _require_together(options, names)
    plans = tuple(_plan_export(options, name) for name in names) or (_plan_export(options, None),)
    require_int8(options, [plan.request.precision for plan in plans])
    return plans


_NAMES = {
    "format": (*get_args(Format), None), "precision": (*get_args(Precision), None), "via": get_args(Via),
    "layout": get_args(Layout), "fallback": (*get_args(Fallback), None),
}  # fmt: skip


def _require_names(options: ExportOptions) -> None:
    """Raise UsageError if an option that takes one of several names has another."""
    for option, names in _NAMES.items():
        value = options.get(option, names[0])
        if value not in names:
            known = [name for name in names if name]
            raise UsageError(
                f"{option} is {value!r}; expected one of {', '.join(known)}.{near_matches(str(value), known)}",
                hint="name one of them",
            )


def _require_together(options: ExportOptions, targets: Sequence[str]) -> None:
    """Raise UsageError if several targets cannot be exported together."""
    if repeated := next((name for name in targets if targets.count(name) > 1), None):
        raise UsageError(f"The target {repeated!r} is named twice in {options.get('target')!r}.")
    layout = options.get("layout", "bundle")
    if BROWSER in targets or layout != "bundle":
        what = f"The target {BROWSER}" if BROWSER in targets else f"The layout {layout}"
        raise UsageError(f"{what} cannot be exported for several targets at once.", hint="export it alone")


def _plan_export(options: ExportOptions, target: str | None) -> ExportPlan:
    """Check the options of an export for one target, and fill in the defaults; raises as `plan_exports`."""
    layout = options.get("layout", "bundle")
    if target == BROWSER:
        _require_browser_options(options)
        resolved = resolve_target(None, format="onnx", precision=options.get("precision"))
    else:
        resolved = resolve_target(target, format=options.get("format"), precision=options.get("precision"))
    via = options.get("via", "onnx")
    require_via(via, format=resolved.format, precision=resolved.precision)
    budget = int8_budget(options, precision=resolved.precision, format=resolved.format)
    require_fallback(options.get("fallback"), format=resolved.format, precision=resolved.precision)
    _require_layout_options(options, layout, resolved)
    labels = label_names(options.get("labels"))
    request = ExportRequest(
        precision=resolved.precision,
        format=resolved.format,
        target=resolved.engine_target or "",
        via=via,
        preprocess_in_graph=options.get("preprocess_in_graph", False),
        budget=budget,
        # The other layouts cannot name the processors that a file is for.
        weight_bits=resolved.weight_bits if layout == "bundle" else 7,
        fallback=options.get("fallback"),
        labels=None if labels is None else tuple(labels),
        text_tower=options.get("text_tower", True),
        threads=options.get("threads", 1),
    )
    return ExportPlan(request, "browser" if target == BROWSER else layout, device=target or "", note=resolved.note)


def _require_layout_options(options: ExportOptions, layout: Layout, resolved: ResolvedTarget) -> None:
    """Raise UsageError if an option cannot be combined with the layout."""
    if layout != "bundle" and resolved.format != "onnx":
        raise UsageError(
            f"The layout {layout} is ONNX; expected {{format}} onnx, not {resolved.format}.",
            hint=f"omit {{layout}}, or export for ONNX: --format onnx --layout {layout}",
        )
    if layout != "bundle" and not options.get("text_tower", True):
        raise UsageError(f"{{layout}} {layout} has both towers.", hint="omit --no-text-tower")
    if layout != "immich" and options.get("as_name") is not None:
        raise UsageError("{as_name} is the name of a model of {layout} immich.", hint="omit {as_name}")
    if layout != "huggingface":
        if options.get("report") is not None:
            raise UsageError("{report} is for the model card of {layout} huggingface.", hint="omit {report}")
        if layout == "immich" and options.get("preprocess_in_graph"):
            raise UsageError("immich does its own preprocessing.", hint="omit {preprocess_in_graph}")
        if layout == "immich" and options.get("labels") is not None:
            raise UsageError("{layout} immich stores no labels.", hint="omit {labels}")
        return
    if options.get("preprocess_in_graph"):
        raise UsageError("transformers.js and fastembed preprocess images.", hint="omit {preprocess_in_graph}")
    if options.get("labels") is not None:
        raise UsageError("{layout} huggingface stores no labels.", hint="omit {labels}")


def _require_browser_options(options: ExportOptions) -> None:
    """Raise UsageError if an option cannot be combined with the browser target."""
    format, layout = options.get("format"), options.get("layout", "bundle")
    for conflict, option in (
        (format not in (None, "onnx"), f"{{format}} {format}"),
        (layout != "bundle", f"{{layout}} {layout}"),
        (bool(options.get("preprocess_in_graph")), "{preprocess_in_graph}"),
    ):
        if conflict:
            raise UsageError(f"{{target}} browser cannot be combined with {option}.", hint=f"omit {option}")


def engine_target_here() -> tuple[str, str]:
    """Return the target for engines if none was named, and a sentence that says so and how to go on.

    It is the GPU of this machine if engines for it can be built now, by TensorRT for RTX; and otherwise a folder that
    builds its own engines: for this Jetson, or for any NVIDIA GPU.
    """
    if jetson := jetson_name():
        return jetson, f"no --target: the folder is for this {SELF_BUILDING_TARGETS[jetson]}; run its build.sh next"
    generic = "nvidia-gpu"
    capability = cuda_capability()
    if not capability:
        return generic, (
            "no --target, and no NVIDIA GPU here: the folder builds its own engines on any; copy it there and run "
            "bash build.sh, or python3 build.py (engines for an RTX card can be built here: --target sm89)"
        )
    target = f"sm{capability.replace('.', '')}"
    if target not in RTX_TARGETS:
        reason = f"{target}, for which TensorRT builds the engines: run the folder's build.sh or build.py next"
    elif find_spec("tensorrt_rtx_bindings") is None:
        reason = (
            f"{target}: run the folder's build.sh or build.py next, which need TensorRT "
            f"(with TensorRT for RTX, the export builds the engines: {install_command('rtx')})"
        )
    else:
        return target, f"no --target: the engines are for the GPU here, {target} ({RTX_TARGETS[target]})"
    return generic, f"no --target: the GPU here is {reason}"


def require_target(name: str | None) -> str:
    """Return `name` if engines, or the files that build them, can be made for it."""
    if name in TARGETS:
        return str(name)
    known = ", ".join(f"{target} ({title.partition(';')[0]})" for target, title in TARGETS.items())
    problem = "An engine needs a target" if name is None else f"Engines cannot be built for {name!r}"
    raise InputError(
        f"{problem}; expected one of {known}.{near_matches(name or '', TARGETS)}", hint="name one: {target} sm86"
    )
