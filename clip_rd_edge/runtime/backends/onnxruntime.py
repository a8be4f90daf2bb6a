"""Run a bundle's towers in ONNX Runtime: its builds, its devices, its sessions, and its kernels for INT8."""

from __future__ import annotations

import contextlib
import hashlib
import io
import platform
import re
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from clip_rd_edge.bundle.formats import EXTERNAL_DATA_SUFFIX
from clip_rd_edge.bundle.manifest import Manifest, Tower, can_saturate
from clip_rd_edge.errors import (
    ClipRdEdgeError,
    ConfigError,
    UnreachableError,
    UsageError,
    in_one_line,
    install_command,
    pip,
)
from clip_rd_edge.runtime.encoder import AUTO, BundleEncoder, Placement, RunOptions, warn
from clip_rd_edge.settings.deploying import Device
from clip_rd_edge.utils.files import machine_failure, sha256_of
from clip_rd_edge.utils.host import ONNXRUNTIMES, installed_versions
from clip_rd_edge.utils.paths import cache_home
from clip_rd_edge.utils.process import NativeCall


def import_onnxruntime() -> Any:
    """Return the module `onnxruntime`."""
    try:
        import onnxruntime as ort
        from onnxruntime import InferenceSession  # noqa: F401 — a folder that lost its files is imported, too
    except Exception as error:
        raise machine_failure(error) or _cannot_be_imported(error) from error
    return ort


def overlapping_builds() -> tuple[str, str] | None:
    """Return what is wrong if several builds are installed in one folder, and the command that fixes it."""
    versions = installed_versions(ONNXRUNTIMES)
    if len(versions) < 2:
        return None
    # The plain one is a requirement of this package, and comes with it; another was wanted.
    build = next(name for name in versions if name != ONNXRUNTIMES[0])
    others = " ".join(name for name in versions if name != build)
    return (
        f"{' and '.join(versions)} are installed in one folder, where each overwrites files of the other",
        f"{pip('uninstall')} -y {others} && {pip('install')} --force-reinstall --no-deps {build}=={versions[build]}",
    )


def _cannot_be_imported(error: Exception) -> ClipRdEdgeError:
    if overlap := overlapping_builds():
        reason, remedy = overlap
    else:  # also where files of it are missing, or it is older than NumPy 2
        package, reason = next(iter(installed_versions(ONNXRUNTIMES)), ONNXRUNTIMES[0]), in_one_line(error)
        remedy = f"{pip('install')} -U --force-reinstall --no-deps {package}"
    return ClipRdEdgeError(f"ONNX Runtime cannot be imported: {reason}.", hint=remedy)


class Provider(NamedTuple):
    """An execution provider of ONNX Runtime.

    Attributes:
        name: ONNX Runtime's name for it.
        package: the package that contains it; empty where OpenVINO without ONNX Runtime serves the device better.
        options: its options; {cache} is a folder for engines, and {threads} their number, without which the option is
            left out.
        needs: what it needs on the machine beside its package.
    """

    name: str
    package: str
    options: Mapping[str, str]
    needs: str = ""


# OpenVINO's processors, by the name of the device. The package openvino runs on them without ONNX Runtime, too.
IN_BF16 = "openvino-bf16"
OPENVINO_PROCESSORS = {"openvino": "CPU", IN_BF16: "CPU", "openvino-gpu": "GPU", "openvino-npu": "NPU"}
_OPENVINO, _GPU_BUILD, _NVIDIA = "OpenVINOExecutionProvider", "onnxruntime-gpu", "NVIDIA's driver, CUDA"
PROVIDERS: dict[str, Provider] = {
    "cpu": Provider("CPUExecutionProvider", "onnxruntime", {}),
    # The default, an exhaustive search, takes seconds for each new batch size.
    "cuda": Provider(
        "CUDAExecutionProvider", _GPU_BUILD, {"cudnn_conv_algo_search": "HEURISTIC"}, f"{_NVIDIA} and cuDNN"
    ),
    # Builds an engine when a tower is opened, which takes minutes the first time.
    "tensorrt": Provider(
        "TensorrtExecutionProvider",
        _GPU_BUILD,
        {
            **{f"trt_{kind}_cache_enable": "True" for kind in ("engine", "timing")},
            **{f"trt_{kind}_cache_path": "{cache}" for kind in ("engine", "timing")},
        },
        f"{_NVIDIA}, cuDNN and TensorRT",
    ),
    "coreml": Provider("CoreMLExecutionProvider", "onnxruntime on a Mac", {"ModelFormat": "MLProgram"}),
    # onnxruntime-openvino ends at 1.24, which gets sums of INT8 wrong on processors with AMX.
    "openvino": Provider(_OPENVINO, "", {"device_type": "CPU", "num_of_threads": "{threads}"}),
    # Both compile a tower when it is opened, which takes seconds the first time.
    "openvino-gpu": Provider(_OPENVINO, "", {"device_type": "GPU", "cache_dir": "{cache}"}),
    "openvino-npu": Provider(_OPENVINO, "", {"device_type": "NPU", "cache_dir": "{cache}"}),
    "xnnpack": Provider(
        "XnnpackExecutionProvider", "a build of onnxruntime with XNNPACK", {"intra_op_num_threads": "{threads}"}
    ),
}
# What `auto` prefers to the CPU: devices that need a package of their own and that start at once. Others have to be
# requested by name: CoreML is in every Mac's package, compiles a tower each time it is opened and rounds to float16;
# TensorRT takes minutes at first; XNNPACK supports float32 only.
_PREFERRED = ("cuda", "openvino")
DEVICES: tuple[str, ...] = get_args(Device)
# Those that keep what they compiled. TensorRT's provider finds an engine again by the model's file name and structure,
# which two trainings of one student share: each model needs a folder of its own.
KEEP_ENGINES = ("tensorrt", "openvino-gpu", "openvino-npu")


def choose_device(device: str, available: Sequence[str], *, precision: str) -> str:
    """Return the device to open a tower on.

    Args:
        device: one of DEVICES.
        available: names of the providers that this ONNX Runtime has.
        precision: the tower's precision. INT8 is chosen for its speed on the CPU, so `auto` keeps it there.
    """
    supported = [name for name, provider in PROVIDERS.items() if provider.name in available]
    if device == AUTO:
        preferred = () if precision.startswith("int8") else _PREFERRED
        return next((name for name in preferred if name in supported), "cpu")
    if device not in supported:
        package = PROVIDERS[device].package
        replaces = " in place of onnxruntime" if package.startswith("onnxruntime-") else ""
        raise UsageError(
            f"This ONNX Runtime has no provider for {device}; it has {', '.join(supported) or 'no known one'}.",
            hint=f"install {package}{replaces}" if package else install_command("openvino"),
        )
    return device


def provider_list(device: str, *, cache: Path, threads: int | None) -> list[tuple[str, dict[str, str]]]:
    """Return the `providers` of InferenceSession, with engines in `cache`; the CPU is last, for what others lack."""
    names = {"cpu": ("cpu",), "tensorrt": ("tensorrt", "cuda", "cpu")}.get(device, (device, "cpu"))
    return [
        (
            PROVIDERS[name].name,
            {
                option: value.format(cache=cache, threads=threads)
                for option, value in PROVIDERS[name].options.items()
                if threads or "{threads}" not in value
            },
        )
        for name in names
    ]


def session_device(session: Any, requested: str) -> str:
    """Return the device that a session uses first; ONNX Runtime falls back silently if a provider fails to start.

    Args:
        requested: the device that it was opened for: several can have the same provider.
    """
    first = session.get_providers()[0]
    if PROVIDERS[requested].name == first:
        return requested
    return next((name for name, provider in PROVIDERS.items() if provider.name == first), first)


# How ONNX Runtime reports that memory cannot be had, also while it starts.
_NO_MEMORY = re.compile("bad_alloc|[Cc]annot allocate memory|Failed to allocate memory")
_LOG_WARNINGS, _LOG_NOTHING = 2, 4  # severities; the first is ONNX Runtime's default


def open_session(
    model: str | bytes, *, threads: int | None = None, device: str = "cpu", spin: bool = True, optimize: bool = True
) -> Any:
    """Open an ONNX Runtime session for a model.

    If the device's provider is installed but fails to start (no driver, another CUDA version), a warning is logged and
    the session runs on the CPU.

    Args:
        model: path of an ONNX file, or its bytes.
        threads: intra-op threads; None uses every core.
        device: one of PROVIDERS.
        spin: let idle threads busy-wait, ONNX Runtime's default and the fastest for a single image. False frees their
            cores for other work, such as opening many images.
        optimize: fuse nodes. False computes each as the file says, which is slower: for reference embeddings.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only: its warnings are about its own graph optimisations
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if threads is not None:
        options.intra_op_num_threads = threads
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    name = model if isinstance(model, str) else "the model"
    try:
        if device != "cpu":
            session, reason = _open_on(ort, model, options, device, threads)
            if session is not None:
                return session
            warn(f"{device} does not start; {name} runs on the CPU instead: {reason}; run clip-rd-edge doctor.")
        return _open(ort, model, options, ["CPUExecutionProvider"])
    except Exception as error:
        failure: ClipRdEdgeError | None = machine_failure(error)
        if _NO_MEMORY.search(str(error)):
            hint = "end other programs, or use a smaller model"
            failure = UnreachableError(f"There is not enough memory to open {name}.", hint=hint)
        reason = f"ONNX Runtime {ort.__version__} cannot run {name}: {in_one_line(error)}."
        raise failure or ConfigError(reason) from error


def _open_on(ort: Any, model: str | bytes, options: Any, device: str, threads: int | None) -> tuple[Any, str]:
    """Return a session that really runs on `device`, or None and the reason why there is none."""
    engines = cache_home() / "engines"
    if device in KEEP_ENGINES:
        engines /= _engine_folder(model)
    providers = provider_list(device, cache=engines, threads=threads)
    try:
        if PROVIDERS[device].package == PROVIDERS["cuda"].package:
            _preload_cuda()
        session = _open(ort, model, options, providers)
    except Exception as error:  # noqa: BLE001 — drivers raise anything; if the model is at fault, the CPU raises, too
        return None, in_one_line(error)
    if session_device(session, device) != device:
        needs = PROVIDERS[device].needs
        return None, f"its provider could not be loaded{f', which needs {needs}' if needs else ''}"
    return session, ""


def start_failure(model: bytes, device: str) -> str:
    """Return why ONNX Runtime does not run a model on a device, or an empty string; it logs nothing meanwhile."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = _LOG_NOTHING
    ort.set_default_logger_severity(_LOG_NOTHING)
    try:
        return _open_on(ort, model, options, device, None)[1]
    finally:
        ort.set_default_logger_severity(_LOG_WARNINGS)


@cache
def _preload_cuda() -> None:
    """Load the libraries of CUDA and cuDNN that pip has installed, where the system's loader does not look."""
    ort = import_onnxruntime()
    if hasattr(ort, "preload_dlls"):  # since 1.21
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            ort.preload_dlls()


def _open(ort: Any, model: str | bytes, options: Any, providers: Sequence[Any]) -> Any:
    # ONNX Runtime's own fallback prints to stdout, which is reserved for results.
    return Session(ort.InferenceSession(model, options, providers=providers, enable_fallback=0))


def _engine_folder(model: str | bytes) -> str:
    """Return a name that changes with the model, also with weights that are in a file of their own."""
    if isinstance(model, bytes):
        return hashlib.sha256(model).hexdigest()[:32]
    data = Path(f"{model}{EXTERNAL_DATA_SUFFIX}")
    return "-".join(sha256_of(path)[:32] for path in (Path(model), *([data] if data.is_file() else [])))


class Session:
    """A session of ONNX Runtime, whose runs a stop signal ends."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._current = self._new_call()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, names: Sequence[str] | None, feed: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        while True:
            options, call = self._current
            if call.is_ended:
                options, call = self._current = self._new_call()
            try:
                with call:
                    outputs: list[npt.NDArray[Any]] = self._session.run(names, feed, options)
                    return outputs
            except Exception:
                if not call.by_signal:
                    raise
            # The signal's handler has run here, and lets the program go on.

    @staticmethod
    def _new_call() -> tuple[Any, NativeCall]:
        options = import_onnxruntime().RunOptions()
        options.log_severity_level = _LOG_NOTHING  # the exception says it
        return options, NativeCall(partial(setattr, options, "terminate", True))


_X86 = ("x86_64", "amd64", "x86", "i386", "i686")
_LENGTH, _ACTIVATION, _WEIGHT = 64, 255, 127
# The kernel for AMX takes 32 rows at once, and is wrong where 17 to 31 columns are left.
_ROWS, _COLUMNS = 64, 24
# The versions that `wrong_sums` asks for, as pip reads them. Python 3.10 has none after 1.23.
RIGHT_SUMS = "!=1.21.*,!=1.22.*,!=1.23.*,!=1.24.*"
# An ONNX file, as bytes because a device has no `onnx` to write one: c (M, N) int32 is the MatMulInteger of
# a (M, K) uint8 and b (K, N) int8.
PRODUCT = (
    b'\x08\x05:V\n\x18\n\x01a\n\x01b\x12\x01c"\rMatMulInteger\x12\x07product'
    b"Z\x0f\n\x01a\x12\n\n\x08\x08\x02\x12\x04\n\x00\n\x00Z\x0f\n\x01b\x12\n\n\x08\x08\x03\x12\x04\n\x00\n\x00"
    b"b\x0f\n\x01c\x12\n\n\x08\x08\x06\x12\x04\n\x00\n\x00B\x04\n\x00\x10\n"
)


def int8_fault(sets: Sequence[str], *, runtime: str) -> str:
    """Return why this CPU gets INT8 of these instruction sets wrong in a runtime, and what to do; else nothing."""
    if can_saturate(sets) and processor_saturates():
        return f"its INT8 holds for {' and '.join(sets)}, and this processor has no VNNI: export for any x86 processor"
    return wrong_sums() if sets and runtime == "onnxruntime" else ""


@cache
def processor_saturates() -> bool:
    """Return whether this processor saturates sums of U8 activations times S8 weights of 8 bits."""
    if not _is_x86():
        return False
    activations = np.full((1, _LENGTH), _ACTIVATION, dtype=np.uint8)
    weights = np.full((_LENGTH, 1), _WEIGHT, dtype=np.int8)
    sums = _product(activations, weights)
    return bool(sums[0, 0] != _LENGTH * _ACTIVATION * _WEIGHT)  # 1,048,544 on Haswell


@cache
def wrong_sums() -> str:
    """Return what is wrong if ONNX Runtime gets sums of INT8 products wrong here, and what to do, or an empty string.

    From 1.21 to 1.24, its kernel for AMX gets them wrong, as in each convolution with 24 output channels
    (microsoft/onnxruntime#27671).
    """
    if not _is_x86():
        return ""
    # Weights of 7 bits, which do not saturate.
    activations = (np.arange(_ROWS * _LENGTH) % 251).astype(np.uint8).reshape(_ROWS, _LENGTH)
    weights = (np.arange(_LENGTH * _COLUMNS) % 127 - 63).astype(np.int8).reshape(_LENGTH, _COLUMNS)
    if np.array_equal(_product(activations, weights), activations.astype(np.int32) @ weights.astype(np.int32)):
        return ""
    ort = import_onnxruntime()
    return (
        f"ONNX Runtime {ort.__version__} gets sums of INT8 wrong on this processor: install onnxruntime 1.20, or 1.25 "
        "or newer"
    )


def _is_x86() -> bool:
    return platform.machine().lower() in _X86


def _product(activations: npt.NDArray[np.uint8], weights: npt.NDArray[np.int8]) -> npt.NDArray[np.int32]:
    session: Any = open_session(PRODUCT, threads=1)
    (sums,) = session.run(None, {"a": activations, "b": weights})
    return np.asarray(sums)


class OrtEncoder(BundleEncoder):
    """A bundle in ONNX Runtime; the device `auto` is chosen per tower, by its precision."""

    runtime, devices = "onnxruntime", DEVICES

    def __init__(self, folder: Path, manifest: Manifest, options: RunOptions | None = None) -> None:
        super().__init__(folder, manifest, options)
        if self.options.device not in (AUTO, "cpu"):
            self.device_for(manifest.image)  # fail now, not at the first image

    def open_tower(self, tower: Tower) -> Any:
        chosen = self.device_for(tower)
        path, options = str(self.folder / tower.file), self.options
        session = open_session(path, threads=options.threads, device=chosen, spin=options.spin)
        if (device := session_device(session, chosen)) != chosen:
            hint = "run clip-rd-edge doctor, which shows what is missing, or use --device cpu"
            self._placements[tower.file] = Placement(self.runtime, device, f"{chosen} did not start", hint)
        return session

    def device_for(self, tower: Tower) -> str:
        if self.options.device == "cpu":
            return "cpu"
        available = import_onnxruntime().get_available_providers()
        return choose_device(self.options.device, available, precision=tower.precision)
