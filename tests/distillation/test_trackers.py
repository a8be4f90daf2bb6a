"""Runs reported to TensorBoard and Weights & Biases; the latter's library is a fake."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import pytest
from support import Watch
from tiny_runs import tiny_run

from clip_rd_edge.bundle.runs import METRICS_FILE, read_metrics
from clip_rd_edge.distillation import trackers
from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.run import run_distillation
from clip_rd_edge.distillation.trackers import WandbRun
from clip_rd_edge.errors import InterruptedRunError, MissingExtraError, UsageError

STEPS = 8


@pytest.fixture
def config(pairs_csv: Path) -> RunConfig:
    recipe = {"steps": STEPS, "batch_size": 6}
    return tiny_run("clip", recipe, data=str(pairs_csv), checkpoint_every=3, report_to="wandb")


class FakeWandb(ModuleType):
    """Keeps what is reported; refuses it while `fails` is true."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.opened: list[dict[str, Any]] = []
        self.logged: list[dict[str, float]] = []
        self.exit_codes: list[int] = []
        self.fails = self.forgets = False
        self.Settings = dict

    def init(self, **options: Any) -> Any:
        self.opened.append(options)
        identity = f"other-{len(self.opened)}" if self.forgets else options["id"]
        return SimpleNamespace(
            id=identity, log=self.log, define_metric=lambda *_, **__: None,
            finish=lambda exit_code: self.exit_codes.append(exit_code),
        )  # fmt: skip

    def log(self, figures: dict[str, float]) -> None:
        if self.fails:
            raise ConnectionError("no\nroute")
        self.logged.append(figures)

    @property
    def steps(self) -> list[float]:
        return [figures["step"] for figures in self.logged]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("clip_rd_edge.distillation.trackers.require_tracker", lambda name: None)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return fake


def test_a_resumed_run_continues_the_same_run_of_the_service_and_repeats_no_step(
    config: RunConfig, tmp_path: Path, wandb: FakeWandb
) -> None:
    run = tmp_path / "run"
    stopping = Watch(on_step=lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 5 else None)
    with pytest.raises(InterruptedRunError):
        run_distillation(config, run, resume=False, reporter=stopping)
    assert wandb.steps == [1, 2, 3, 4, 5]
    run_distillation(config, run, resume=True, evaluate=lambda _: {"task": 0.25})
    assert wandb.steps == list(range(1, STEPS + 1))
    first, second = wandb.opened
    assert first["id"] == second["id"]
    assert (first["project"], first["name"], first["dir"], first["resume"]) == ("clip-rd-edge", "run", run, "allow")
    assert first["config"]["recipe"]["steps"] == STEPS
    assert wandb.exit_codes == [1, 0]
    assert wandb.logged[-1]["evaluation/task"] == 0.25
    assert wandb.logged == [{k: v for k, v in line.items() if v is not None} for line in read_metrics(run)]


def test_a_library_that_fails_does_not_stop_the_run_and_gets_what_it_missed_when_that_is_resumed(
    config: RunConfig, tmp_path: Path, wandb: FakeWandb
) -> None:
    watch = Watch()
    tracker = WandbRun(tmp_path, config, watch)
    for step in (1, 2, 3):
        wandb.fails = step > 1
        with (tmp_path / METRICS_FILE).open("a") as file:
            file.write(f'{{"step":{step},"loss":1.0}}\n')
        tracker.write({"step": step, "loss": 1.0})
    assert wandb.steps == [1]
    assert len(watch.noted) == 1
    assert "ConnectionError: no\\nroute" in watch.noted[0]
    wandb.fails = False
    WandbRun(tmp_path, config, watch)
    assert wandb.steps == [1, 2, 3]
    wandb.forgets = True  # the run was deleted there: another one gets all steps
    WandbRun(tmp_path, config, watch)
    assert wandb.steps == [1, 2, 3, 1, 2, 3]


def test_a_service_is_told_no_secret_of_an_address(config: RunConfig, tmp_path: Path, wandb: FakeWandb) -> None:
    address = "https://user:SECRET@a.example/{0..9}.tar?sig=SECRET"
    WandbRun(tmp_path, msgspec.structs.replace(config, data=address, tasks=(address,)), Watch())
    settings = wandb.opened[0]["config"]
    assert "SECRET" not in repr(settings)
    shown = "https://a.example/{0..9}.tar"
    assert (settings["data"], settings["tasks"]) == (shown, (shown,))


def test_a_missing_library_is_reported_before_the_run_begins(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError):
        run_distillation(config, tmp_path / "run", resume=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("mode", "logged_in", "refused"), [("online", False, True), ("online", True, False), ("offline", False, False)]
)
def test_weights_and_biases_is_never_asked_for_a_key_in_the_middle_of_a_run(
    monkeypatch: pytest.MonkeyPatch, mode: str, logged_in: bool, refused: bool
) -> None:
    def login(*, prompt: bool = True) -> bool:
        assert not prompt
        return logged_in

    session = SimpleNamespace(settings=SimpleNamespace(mode=mode))
    fake = ModuleType("wandb")
    vars(fake).update(login=login, setup=lambda settings: session, Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    if refused:
        with pytest.raises(UsageError) as raised:
            trackers.require_tracker("wandb")
        assert "WANDB_MODE=offline" in raised.value.hint
    else:
        trackers.require_tracker("wandb")
