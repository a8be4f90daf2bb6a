"""Run a bundle's towers in ONNX Runtime."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec

from clip_rd_edge.contract.bundle import EXTERNAL_DATA_SUFFIX, Manifest, Tower
from clip_rd_edge.contract.encoder import Description
from clip_rd_edge.errors import ConfigError, in_one_line
from clip_rd_edge.runtime.backends.providers import (
    AUTO,
    KEEP_ENGINES,
    choose_device,
    provider_list,
    session_device,
    warn,
)
from clip_rd_edge.runtime.backends.session import require_threads
from clip_rd_edge.runtime.encoder import BundleEncoder, Placement, RunOptions
from clip_rd_edge.utils.files import sha256_of
from clip_rd_edge.utils.paths import cache_home


def open_session(
    model: str | bytes,
    *,
    threads: int | None = None,
    device: str = "cpu",
    spin: bool = True,
    optimize: bool = True,
) -> Any:
    """Open an ONNX Runtime session for a model.

    If the device's provider is installed but fails to start (no driver, another CUDA version), a warning is logged and
    the session runs on the CPU.

    Args:
        model: path of an ONNX file, or its bytes.
        threads: intra-op threads; None uses every core.
        device: one of `providers.PROVIDERS`.
        spin: let idle threads busy-wait, ONNX Runtime's default and the fastest for a single image. False frees their
            cores for other work, such as opening many images.
        optimize: fuse nodes. False computes each as the file says, which is slower: for reference answers.

    Raises:
        ConfigError: this ONNX Runtime cannot run the model.
        UsageError: `threads` is out of range.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only: its warnings are about its own graph optimisations
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    require_threads(threads)
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
            warn(f"{device} does not start; {name} runs on the CPU instead: {reason}.")
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ConfigError(f"ONNX Runtime {ort.__version__} cannot run {name}: {in_one_line(error)}.") from error


def _open_on(ort: Any, model: str | bytes, options: Any, device: str, threads: int | None) -> tuple[Any, str]:
    """Return a session that really runs on `device`, or None and the reason why there is none."""
    cache = cache_home() / "engines"
    if device in KEEP_ENGINES:
        cache /= _engine_folder(model)
    providers = provider_list(device, cache=cache, threads=threads)
    try:
        # ONNX Runtime's own fallback prints to stdout, which is reserved for results.
        session = ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:  # noqa: BLE001 — drivers raise anything; if the model is at fault, the CPU raises, too
        return None, in_one_line(error)
    if session_device(session, device) != device:
        return None, "its provider could not be loaded; run clip-rd-edge doctor to check the driver"
    return session, ""


def _engine_folder(model: str | bytes) -> str:
    """Return a name that changes with the model, also with weights that are in a file of their own."""
    if isinstance(model, bytes):
        return hashlib.sha256(model).hexdigest()[:32]
    data = Path(f"{model}{EXTERNAL_DATA_SUFFIX}")
    return "-".join(sha256_of(path)[:32] for path in (Path(model), *([data] if data.is_file() else [])))


class OrtEncoder(BundleEncoder):
    """A bundle in ONNX Runtime.

    Args:
        device: one of `providers.DEVICES`; `auto` chooses per tower, by its precision.
        spin: see `open_session`.

    Raises:
        UsageError: this ONNX Runtime does not support the device.
    """

    runtime = "onnxruntime"

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        device: str = AUTO,
        spin: bool = True,
    ) -> None:
        super().__init__(folder, manifest, threads=threads)
        self.device = device
        self.spin = spin
        self._loaded_devices: dict[str, str] = {}  # by file name
        if device not in (AUTO, "cpu"):
            self._device_for(manifest.image)  # fail now, not at the first image

    @classmethod
    def open(cls, folder: Path, manifest: Manifest, options: RunOptions) -> OrtEncoder:
        """Open a bundle."""
        return cls(folder, manifest, threads=options.threads, device=options.device, spin=options.spin)

    def describe(self) -> Description:
        """Describe this encoder; `device` is the chosen one, or where a loaded tower actually runs."""
        towers = self.manifest.towers.values()
        devices = dict.fromkeys(self._loaded_devices.get(tower.file) or self._device_for(tower) for tower in towers)
        return msgspec.structs.replace(super().describe(), device=" + ".join(devices))

    def open_tower(self, tower: Tower) -> Any:
        """Open an ONNX Runtime session for the tower; raises as `open_session`."""
        device = self._device_for(tower)
        session = open_session(str(self.folder / tower.file), threads=self.threads, device=device, spin=self.spin)
        self._loaded_devices[tower.file] = session_device(session, device)
        return session

    def placement(self, tower: Tower) -> Placement:
        """Return where a tower runs; it is a fallback if it was loaded, and the chosen device did not start."""
        chosen = self._device_for(tower)
        device = self._loaded_devices.get(tower.file, chosen)
        return Placement(self.runtime, device, "" if device == chosen else f"{chosen} did not start")

    def _device_for(self, tower: Tower) -> str:
        if self.device == "cpu":
            return "cpu"
        import onnxruntime as ort

        return choose_device(self.device, ort.get_available_providers(), precision=tower.precision)
