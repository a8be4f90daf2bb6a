"""A run that gets SIGTERM at any moment exits with code 75, and resumes to the weights of an uninterrupted one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from failing_datasets import work_for
from support import PATIENCE_S, write_pairs
from thread_processes import fork_server
from tiny_runs import tiny_run, weights

from clip_rd_edge.bundle.encoder import Encoder
from clip_rd_edge.bundle.runs import read_metrics
from clip_rd_edge.data.load import load_pairs
from clip_rd_edge.data.order import StepSampler
from clip_rd_edge.distillation import loop
from clip_rd_edge.distillation import setup as build
from clip_rd_edge.distillation.checkpoint import list_checkpoints
from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.loader import Batch, ViewDataset, step_loader
from clip_rd_edge.distillation.pixels import Crops
from clip_rd_edge.distillation.processes import stop_on_signals, stop_signals_blocked
from clip_rd_edge.distillation.run import run_distillation
from clip_rd_edge.errors import InterruptedRunError
from clip_rd_edge.models.students import student_config

STEPS = 6


def run_on(pairs: Path) -> RunConfig:
    recipe = {"steps": STEPS, "batch_size": 6}
    return tiny_run("clip", recipe, data=str(pairs), evaluate_every=2, log_every=10)


@pytest.fixture
def config(pairs_csv: Path) -> RunConfig:
    return run_on(pairs_csv)


def score(_: Encoder) -> dict[str, float]:
    return {"task": 0.5}


def train(config: RunConfig, run: Path, *, resume: bool = False) -> dict[str, torch.Tensor]:
    return weights(run_distillation(config, run, resume=resume, evaluate=score))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a run with `config` that nothing interrupted."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return train(run_on(write_pairs(folder)), folder / "run")


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def check_resumed(config: RunConfig, run: Path, expected: dict[str, torch.Tensor]) -> None:
    """Resume a stopped run; its weights and the evaluated steps must be those of an uninterrupted one."""
    actual = train(config, run, resume=True)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    logged = {line["step"]: line.get("evaluation/task") for line in read_metrics(run)}
    assert {step for step, value in logged.items() if value == 0.5} == {2, 4, 6}


@pytest.mark.parametrize("stops", [(1, 2), (3,)], ids=["in the middle, and when it is repeated", "after the last step"])
def test_sigterm_during_an_evaluation_saves_at_once_and_the_resumed_run_repeats_it(
    config: RunConfig, expected: dict[str, torch.Tensor], tmp_path: Path, stops: tuple[int, ...]
) -> None:
    calls, finished = list[int](), list[int]()

    def evaluate(encoder: Encoder) -> dict[str, float]:
        calls.append(len(calls) + 1)
        if len(calls) in stops:
            terminate()
            time.sleep(10)
        finished.append(len(calls))
        return score(encoder)

    for number in stops:
        with pytest.raises(InterruptedRunError, match=f"SIGTERM after step {2 * stops[0]} of 6"):
            run_distillation(config, tmp_path / "run", resume=number > stops[0], evaluate=evaluate)
        assert len(calls) == number
        assert number not in finished
    check_resumed(config, tmp_path / "run", expected)


@pytest.mark.parametrize("waiting_for", [0, 3])
def test_sigterm_while_waiting_for_data_stops_at_once(
    config: RunConfig,
    expected: dict[str, torch.Tensor],
    tmp_path: Path,
    waiting_for: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stuck(*arguments: Any, **options: Any) -> Iterator[Batch]:
        for number, batch in enumerate(step_loader(*arguments, **options)):
            if number == waiting_for:
                terminate()
                time.sleep(30)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(loop, "step_loader", stuck)
        where = f"after step {waiting_for} of 6; saved" if waiting_for else "before the first of 6 steps"
        with pytest.raises(InterruptedRunError, match=f"SIGTERM {where}"):
            train(config, tmp_path / "run")
    assert len(list_checkpoints(tmp_path / "run")) == (1 if waiting_for else 0)
    check_resumed(config, tmp_path / "run", expected)


def test_sigterm_while_the_data_are_indexed_loses_nothing(
    config: RunConfig, expected: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(build, "load_samples", lambda *_, **__: terminate())
        with pytest.raises(InterruptedRunError, match="Stopped by SIGTERM; before the first step") as error:
            train(config, tmp_path / "run")
    assert error.value.exit_code == 75
    check_resumed(config, tmp_path / "run", expected)


HUNG_UP = """
import sys, time
from pathlib import Path
from clip_rd_edge.distillation.processes import stop_on_signals

with stop_on_signals() as request, request.deferred():
    print("begun", flush=True)
    while not request:
        time.sleep(0.001)
    for stream in (sys.stdout, sys.stderr):
        print("saving", file=stream, flush=True)
    Path(sys.argv[1]).write_text(request.signal_name)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a terminal that can be closed")
@pytest.mark.usefixtures("hang_up")
def test_what_is_printed_after_a_terminal_was_closed_does_not_keep_a_run_from_saving(tmp_path: Path) -> None:
    import pty  # Windows has none

    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", HUNG_UP, str(tmp_path / "saved")])
    assert os.read(terminal, 5) == b"begun"
    os.close(terminal)
    assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / "saved").read_text() == "SIGHUP"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_under_nohup_a_run_goes_on_without_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def dataset(pairs_csv: Path) -> ViewDataset:
    from clip_rd_edge.bundle.preprocess import Preprocessing
    from clip_rd_edge.utils.structs import convert

    raw = student_config("test_resnet", embedding_size=8, image_size=32)["preprocess_cfg"]
    preprocessing = convert(raw, Preprocessing, source="test")
    return ViewDataset(load_pairs(str(pairs_csv)), preprocessing, [], crops=Crops(scale=(0.9, 1.0)), seed=0)


posix = pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs sigwaitinfo")


@posix
def test_loader_workers_survive_the_signals_of_their_group_and_end_with_the_run(pairs_csv: Path) -> None:
    sampler = StepSampler([24], 6, seed=0, steps=range(12))
    batches = step_loader(dataset(pairs_csv), sampler, workers=2)
    captions = [next(batches).captions]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            from_elsewhere(worker.pid, number)
    captions += [batch.captions for batch in batches]
    assert captions == [batch.captions for batch in step_loader(dataset(pairs_csv), sampler, workers=0)]
    assert not any(worker.is_alive() for worker in workers)


def from_elsewhere(pid: int | None, number: signal.Signals) -> None:
    """Send a signal from a process that is not the worker's parent."""
    sender: Callable[[], int] = os.fork
    child = sender()
    if child == 0:
        os.kill(pid or 0, number)
        os._exit(0)
    os.waitpid(child, 0)
    time.sleep(0.2)


@posix
def test_a_process_of_a_fork_server_obeys_who_started_it() -> None:
    """The default from Python 3.14 on."""
    context = fork_server()
    started = context.Event()
    with stop_signals_blocked():
        process = context.Process(target=work_for, args=(os.getpid(), started), daemon=True)
        process.start()
    assert started.wait(PATIENCE_S)
    process.terminate()
    process.join(20)
    ended = not process.is_alive()
    process.kill()
    assert ended
