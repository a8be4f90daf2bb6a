"""Data sets whose worker processes fail, for tests: in a file that processes which are not forked can import."""

from __future__ import annotations

import os
import resource
import signal
import time
from multiprocessing.synchronize import Event

from torch.utils.data import get_worker_info

from clip_rd_edge.data.order import View
from clip_rd_edge.distillation.loader import PairView, ViewDataset
from clip_rd_edge.distillation.processes import obey_only_the_parent
from clip_rd_edge.errors import ConfigError


class Cramped(ViewDataset):
    """Leaves its worker process no shared memory to speak of, as a small /dev/shm does."""

    def __getitem__(self, view: View) -> PairView:
        assert get_worker_info() is not None
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        return super().__getitem__(view)


class Refusing(ViewDataset):
    """Raises in its worker process, as a damaged cache does."""

    def __getitem__(self, view: View) -> PairView:
        assert get_worker_info() is not None
        raise ConfigError("It is damaged.", hint="repair it")


class Killed(ViewDataset):
    """Ends its worker process as the kernel does when memory runs out."""

    def __getitem__(self, view: View) -> PairView:
        assert get_worker_info() is not None
        os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(view)


def work_for(parent: int, started: Event) -> None:
    """Stand for a loader process: obey the parent alone, and take long."""
    obey_only_the_parent(parent)
    started.set()
    time.sleep(60)
