"""Run a bundle's towers in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from clip_rd_edge.bundle.encoder import Description
from clip_rd_edge.bundle.manifest import Manifest, Tower
from clip_rd_edge.runtime.backends.onnxruntime_builds import import_onnxruntime
from clip_rd_edge.runtime.backends.providers import AUTO, choose_device, session_device
from clip_rd_edge.runtime.backends.session import open_session
from clip_rd_edge.runtime.encoder import BundleEncoder, Placement, RunOptions


class OrtEncoder(BundleEncoder):
    """A bundle in ONNX Runtime.

    Args:
        device: one of `providers.DEVICES`; `auto` chooses per tower, by its precision.
        spin: see `open_session`.
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

    def is_shared_by_fork(self, tower: Tower) -> bool:
        """Return whether a forked process may use an open tower: one thread on the CPU is the caller's."""
        return self.threads == 1 and self._loaded_devices.get(tower.file) == "cpu"

    def placement(self, tower: Tower) -> Placement:
        """Return where a tower runs; it is a fallback if it was loaded, and the chosen device did not start."""
        chosen = self._device_for(tower)
        device = self._loaded_devices.get(tower.file, chosen)
        if device == chosen:
            return Placement(self.runtime, device)
        hint = "run clip-rd-edge doctor, which says what is missing, or use --device cpu"
        return Placement(self.runtime, device, f"{chosen} did not start", hint)

    def _device_for(self, tower: Tower) -> str:
        if self.device == "cpu":
            return "cpu"
        available = import_onnxruntime().get_available_providers()
        return choose_device(self.device, available, precision=tower.precision)
