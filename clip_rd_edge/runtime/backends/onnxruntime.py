"""A bundle's towers in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from clip_rd_edge.contract.bundle import Manifest, Tower
from clip_rd_edge.contract.encoder import Description
from clip_rd_edge.errors import ConfigError, UsageError
from clip_rd_edge.runtime.backends.providers import AUTO, choose_device, device_of, provider_list, say
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.utils.io import cache_home


def open_session(model: str | bytes, *, threads: int | None = None, device: str = "cpu", spin: bool = True) -> Any:
    """An ONNX Runtime session for a file's path or a model's bytes.

    A device whose provider is there but does not start (no driver, another CUDA) is said, and the CPU takes its place.

    Args:
        spin: threads wait for one another in a loop, ONNX Runtime's default: fastest for one picture. False leaves
            their cores to whatever else has work, such as opening many pictures.

    Raises:
        ConfigError: it is no model that this ONNX Runtime can run.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3  # its warnings are about its own graph rewriting
    if threads is not None:
        if threads < 1:
            raise UsageError(f"threads is {threads}; at least 1 is needed.")
        options.intra_op_num_threads = threads
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    shown = model if isinstance(model, str) else "the model"
    try:
        if device != "cpu":
            session, reason = _try(ort, model, options, device, threads)
            if session is not None:
                return session
            say(f"{device} does not start and the CPU takes its place for {shown}: {reason}.")
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ConfigError(f"ONNX Runtime {ort.__version__} cannot run {shown}: {error}.") from error


def _try(ort: Any, model: str | bytes, options: Any, device: str, threads: int | None) -> tuple[Any, str]:
    """A session that does run on the device, or None and why not."""
    providers = provider_list(device, cache=cache_home() / "engines", threads=threads)
    try:
        # Its own way to fall back prints to stdout, which is for results.
        session = ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:  # noqa: BLE001 — whatever a driver says; whether it is the model's fault, the CPU tells
        return None, " ".join(str(error).split()).rstrip(".")[:300]
    if device_of(session) != device:
        return None, "its provider could not be loaded; clip-rd-edge doctor looks for its driver"
    return session, ""


class OrtEncoder(BundleEncoder):
    """A bundle in ONNX Runtime.

    Args:
        device: see `providers`; each tower gets what suits its precision where it is `auto`.
        spin: see `open_session`.

    Raises:
        UsageError: there is no such device here.
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
        self._opened: dict[str, str] = {}
        if device not in (AUTO, "cpu"):
            self._device_for(manifest.image)  # refused now, not at the first picture

    def describe(self) -> Description:
        """What this encoder is; its device is what was chosen, and once a tower is loaded, what it runs on."""
        towers = (self.manifest.image, self.manifest.text)
        devices = dict.fromkeys(self._opened.get(tower.file) or self._device_for(tower) for tower in towers)
        return msgspec.structs.replace(super().describe(), device=" + ".join(devices))

    def open_tower(self, tower: Tower) -> Any:
        """An ONNX Runtime session of the tower; raises as `open_session`."""
        session = open_session(
            str(self.folder / tower.file), threads=self.threads, device=self._device_for(tower), spin=self.spin
        )
        self._opened[tower.file] = device_of(session)
        return session

    def _device_for(self, tower: Tower) -> str:
        if self.device == "cpu":
            return "cpu"
        import onnxruntime as ort

        return choose_device(self.device, ort.get_available_providers(), precision=tower.precision)
