"""Checkpoints of a run: the complete state, so that a resumed run continues as if it had never stopped."""

from __future__ import annotations

import io
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clip_rd_edge.bundle.runs import INPUTS_FILE, METRICS_FILE, RUN_CONFIG_FILE, read_metrics
from clip_rd_edge.distillation.processes import Processes
from clip_rd_edge.errors import ConfigError, InterruptedRunError, LostProcessError, UsageError
from clip_rd_edge.utils.files import disk_full_error, sha256_of
from clip_rd_edge.utils.outputs import LOCK_FILE, new_folder
from clip_rd_edge.utils.text import SILENT, Reporter

KEPT_CHECKPOINTS = 2  # the second newest is a fallback in case the newest is damaged on disk
CHECKPOINTS_FOLDER = "checkpoints"
BEST_FOLDER = "best"  # the best student by the run's own evaluations
TENSORBOARD_FOLDER, TRACKING_FILE = "tensorboard", "tracking.json"  # see `trackers`
STATE_FILE, CHECKSUM_FILE = "state.pt", "state.pt.sha256"


# What a run writes before its first checkpoint.
_WRITTEN_FIRST = (RUN_CONFIG_FILE, INPUTS_FILE, METRICS_FILE, TRACKING_FILE)


@contextmanager
def no_trace_of_failure(run: Path, processes: Processes) -> Iterator[None]:
    """Within the block, a new run that fails before its first checkpoint leaves nothing in its folder.

    The corrected command then begins anew. A run that was interrupted or lost a process, or whose disk is full, stays:
    the same command resumes it. Metrics stay if they may show what went wrong; for bad input, the error does.
    """
    is_new = processes.is_main and not any(path.name != LOCK_FILE for path in run.iterdir())
    try:
        yield
    except Exception as error:
        is_resumed = isinstance(error, InterruptedRunError | LostProcessError) or disk_full_error(error) is not None
        is_of_input = isinstance(error, UsageError) or not read_metrics(run)
        if is_new and is_of_input and not (is_resumed or list_checkpoints(run) or (run / BEST_FOLDER).exists()):
            with suppress(OSError):
                for name in _WRITTEN_FIRST:
                    (run / name).unlink(missing_ok=True)
                shutil.rmtree(run / TENSORBOARD_FOLDER, ignore_errors=True)
        raise


def save_checkpoint(run: Path, step: int, parts: Mapping[str, Any]) -> Path:
    """Write `checkpoints/step-N` atomically, and remove all but the newest KEPT_CHECKPOINTS.

    Args:
        step: the number of completed steps. Learning-rate schedule, data position and random draws follow from it and
            from the seed, so they need no state.
        parts: what is saved, by its key in the file; each has a state dictionary, as a module has.
    """
    state = {"step": step, **{name: part.state_dict() for name, part in parts.items()}}
    folder = run / CHECKPOINTS_FOLDER / f"step-{step}"
    with new_folder(folder) as temporary:
        with (temporary / STATE_FILE).open("wb") as file:
            torch.save(state, file)
        # In the format of sha256sum.
        (temporary / CHECKSUM_FILE).write_text(f"{sha256_of(temporary / STATE_FILE)}  {STATE_FILE}\n")
    for old in list_checkpoints(run)[:-KEPT_CHECKPOINTS]:
        # Somebody may have it open, which Windows and NFS do not like; the next save tries again.
        shutil.rmtree(old, ignore_errors=True)
    return folder


def list_checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    folders = [path for path in (run / CHECKPOINTS_FOLDER).glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))


_NONE_INTACT = -1


def load_checkpoint(run: Path, parts: Mapping[str, Any], processes: Processes, *, reporter: Reporter = SILENT) -> int:
    """Restore the newest intact checkpoint; return the number of completed steps, 0 without a checkpoint.

    All processes load the one that is the newest intact one for the main process, which reports damaged ones.
    """
    step, problems, state = 0, list[str](), dict[str, Any]()
    if processes.is_main:
        for folder in reversed(list_checkpoints(run)):
            try:
                state = _read_state(folder)
            except Exception as error:  # noqa: BLE001  a damaged file can raise anything
                problems.append(f"{folder.name}: {str(error).rstrip('.')}")
                continue
            step = int(state["step"])
            break
        else:
            step = _NONE_INTACT if problems else 0
    step = processes.from_main(step)
    if step == _NONE_INTACT:
        example = f" ({problems[0]})" if problems else ""
        raise ConfigError(f"No checkpoint in {run / CHECKPOINTS_FOLDER} can be read{example}.", hint="start a new run")
    for problem in problems:
        reporter.note(f"the checkpoint {problem}; the run goes on from step {step} instead")
    if step == 0:
        return 0
    if processes.world_size > 1:  # machines need not share their files
        path = run / CHECKPOINTS_FOLDER / f"step-{step}" / STATE_FILE
        content = processes.from_main(path.read_bytes() if processes.is_main else b"")
        state = state or _decode(io.BytesIO(content))
    for name, part in parts.items():
        if name in state:  # a bank has none while there is a store
            part.load_state_dict(state[name])
    return step


def _read_state(folder: Path) -> dict[str, Any]:
    checksum = folder / CHECKSUM_FILE
    if checksum.is_file() and sha256_of(folder / STATE_FILE) != checksum.read_text()[:64]:
        raise ConfigError(f"{STATE_FILE} does not match its checksum")
    return _decode(folder / STATE_FILE)


def _decode(file: Path | io.BytesIO) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return state


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch, which initial weights among others are drawn from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
