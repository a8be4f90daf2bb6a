"""Spread work over a Ray cluster, by Ray Data: it schedules, and repeats what a lost worker or machine was doing."""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from clip_rd_edge.errors import ClipRdEdgeError, UsageError, first_line, needs_extra, relayed_error

T = TypeVar("T")
R = TypeVar("R")


def map_on_cluster(address: str, make: Callable[[], Callable[[T], R]], items: Iterable[T]) -> Iterator[R]:
    """Yield a function's result for each item, in order, computed by the workers of a Ray cluster.

    There is a worker per GPU, or one per machine if there are none, which uses all of its processors. What a lost
    worker had begun is computed again by another.

    Args:
        address: of the cluster, as for `ray.init`: `auto` for the one that this machine belongs to, or HOST:PORT.
        make: returns the function; called once in each worker, in this process's working folder if it exists there.
        items: read as a whole before the first one is computed; they and the results are pickled.
    """
    with needs_extra("ray", extra="ray", purpose="{ray}"):
        import ray
        from ray.data import DataContext
        from ray.data import from_items as data_set_of
    rows = [{"item": pickle.dumps(item)} for item in items]
    if not rows:
        return
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"There is no Ray cluster at {address}: {first_line(error)}.", hint="start one with ray start --head"
            ) from error
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    gpus = int(ray.cluster_resources().get("GPU", 0))
    processors = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    resources: dict[str, float] = {"num_gpus": 1} if gpus else {"num_cpus": max(1, min(filter(None, processors)))}
    computed = data_set_of(rows, override_num_blocks=len(rows)).map(
        _Worker,
        fn_constructor_args=(make, str(Path.cwd())),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=gpus or len(processors)),
        **resources,
    )
    try:
        for row in computed.iter_rows():
            result = pickle.loads(row["result"])
            if isinstance(result, ClipRdEdgeError):
                raise result
            yield result
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1].rstrip(".")
        raise ClipRdEdgeError(
            f"The Ray cluster could not do the work: {reason}.", hint="run it again: what was done is kept"
        ) from error


class _Worker:
    """An actor's state: the function, which is made at the first item, so that an error is the answer to it."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]], folder: str) -> None:
        self._make, self._folder = make, folder
        self._call: Callable[[Any], Any] | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, bytes]:
        try:
            if self._call is None:
                with suppress(OSError):
                    os.chdir(self._folder)
                self._call = self._make()
            result = self._call(pickle.loads(row["item"]))
        except ClipRdEdgeError as error:
            message = f"The Ray worker on {socket.gethostname()} cannot go on: {error}"
            result = relayed_error(message, hint=error.advice, exit_code=error.exit_code)
        return {"result": pickle.dumps(result)}
