"""Runs reported to TensorBoard, Weights & Biases and MLflow; with the real libraries where they are installed."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping
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
from clip_rd_edge.distillation.distill import run_distillation
from clip_rd_edge.distillation.trackers import Outcome, RemoteRun, Service
from clip_rd_edge.errors import InterruptedRunError, MissingExtraError, UsageError

STEPS = 8


@pytest.fixture
def config(pairs_csv: Path) -> RunConfig:
    recipe = {"steps": STEPS, "batch_size": 6}
    return tiny_run("clip", recipe, data=str(pairs_csv), checkpoint_every=3, report_to="wandb")


class FakeService(Service):
    """Keeps what is reported; refuses it while `fails` is true."""

    name = "Fake"
    key = "wandb"

    def __init__(self) -> None:
        self.opened: list[str | None] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.outcomes: list[Outcome] = []
        self.fails = False
        self.forgets = False

    def open(self, run: Path, identity: str | None, settings: Mapping[str, Any]) -> str:
        assert settings["recipe"]["steps"] == STEPS
        self.opened.append(identity)
        return f"run-{len(self.opened)}" if identity is None or self.forgets else identity

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        if self.fails:
            raise ConnectionError("no\nroute")
        self.logged.append((step, dict(figures)))

    def close(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.logged]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> FakeService:
    fake = FakeService()
    monkeypatch.setattr(trackers, "WandbService", lambda: fake)
    monkeypatch.setattr(trackers, "require_tracker", lambda name: None)
    monkeypatch.setattr("clip_rd_edge.distillation.run.require_tracker", lambda name: None)
    return fake


def stopped_after(steps: int) -> Watch:
    """A watch that stops the run as Ctrl-C does, after so many steps."""
    import signal

    return Watch(on_step=lambda step: os.kill(os.getpid(), signal.SIGINT) if step == steps else None)


def test_a_resumed_run_continues_the_same_run_of_the_service_and_repeats_no_step(
    config: RunConfig, tmp_path: Path, service: FakeService
) -> None:
    run = tmp_path / "run"
    scores = iter([0.25, 0.5])

    def evaluate(_: object) -> dict[str, float]:
        return {"task": next(scores)}

    with pytest.raises(InterruptedRunError):
        run_distillation(config, run, resume=False, reporter=stopped_after(5))
    assert service.steps == [1, 2, 3, 4, 5]
    run_distillation(config, run, resume=True, evaluate=evaluate)
    assert service.steps == list(range(1, STEPS + 1))
    assert service.opened == [None, "run-1"]
    assert service.outcomes == ["stopped", "finished"]
    assert service.logged[-1][1]["evaluation/task"] == 0.25
    lines = [{"step": step, **figures} for step, figures in service.logged]
    assert lines == [{k: v for k, v in line.items() if v is not None} for line in read_metrics(run)]


def remote(run: Path, service: FakeService, config: RunConfig, reporter: Watch | None = None) -> RemoteRun:
    return RemoteRun(run, service, config, reporter or Watch())


def test_a_run_begins_with_what_was_logged_before_it_was_reported(config: RunConfig, tmp_path: Path) -> None:
    service = FakeService()
    (tmp_path / METRICS_FILE).write_text('{"step":1,"loss":2.0}\n{"step":2,"loss":null}\n')
    tracker = remote(tmp_path, service, config)
    tracker.write({"step": 3, "loss": math.nan, "rate": 0.5})
    assert service.logged == [(1, {"loss": 2.0}), (2, {}), (3, {"rate": 0.5})]


def test_a_service_that_fails_does_not_stop_the_run_and_gets_what_it_missed(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, watch, now = FakeService(), Watch(), [100.0]
    monkeypatch.setattr(trackers, "time", SimpleNamespace(monotonic=lambda: now[0], time=lambda: 0.0))
    tracker = remote(tmp_path, service, config, watch)

    def log(step: int, *, fails: bool) -> list[int]:
        service.fails = fails
        with (tmp_path / METRICS_FILE).open("a") as file:
            file.write(f'{{"step":{step},"loss":1.0}}\n')
        tracker.write({"step": step, "loss": 1.0})
        return service.steps

    assert log(1, fails=False) == log(2, fails=True) == log(3, fails=True) == [1]
    assert len(watch.noted) == 1
    assert "Fake could not be reached (ConnectionError: no\\nroute)" in watch.noted[0]
    assert log(4, fails=False) == [1]  # too early for another attempt
    now[0] += 61
    assert log(5, fails=False) == log(6, fails=True) == [1, 2, 3, 4, 5]
    tracker.close("stopped")
    assert service.outcomes == ["stopped"]
    service.fails = False
    remote(tmp_path, service, config)
    assert service.steps == [1, 2, 3, 4, 5, 6]


def test_a_service_is_told_no_secret_of_an_address(config: RunConfig, tmp_path: Path) -> None:
    class Curious(FakeService):
        def open(self, run: Path, identity: str | None, settings: Mapping[str, Any]) -> str:
            self.settings = settings
            return super().open(run, identity, settings)

    service, address = Curious(), "https://user:SECRET@a.example/{0..9}.tar?sig=SECRET"
    remote(tmp_path, service, msgspec.structs.replace(config, data=address, tasks=(address,)))
    assert "SECRET" not in repr(service.settings)
    shown = "https://a.example/{0..9}.tar"
    assert (service.settings["data"], service.settings["tasks"]) == (shown, (shown,))


def test_a_late_evaluation_is_added_to_its_step(config: RunConfig, tmp_path: Path) -> None:
    service = FakeService()
    tracker = remote(tmp_path, service, config)
    tracker.write({"step": 1, "loss": 1.0})
    tracker.write({"step": 1, "loss": 1.0})
    tracker.add({"step": 1, "evaluation/task": 0.5})
    assert service.logged == [(1, {"loss": 1.0}), (1, {"evaluation/task": 0.5})]


def test_a_run_that_was_deleted_there_is_replaced(config: RunConfig, tmp_path: Path) -> None:
    service, watch = FakeService(), Watch()
    remote(tmp_path, service, config).write({"step": 1, "loss": 1.0})
    (tmp_path / METRICS_FILE).write_text('{"step":1,"loss":1.0}\n')
    service.forgets = True
    remote(tmp_path, service, config, watch)
    assert watch.noted == ["Fake no longer has the run run-1: run-2 replaces it"]
    assert service.steps == [1, 1]


@pytest.mark.parametrize(("name", "extra"), [("tensorboard", "train"), ("wandb", "wandb"), ("mlflow", "mlflow")])
def test_a_missing_library_is_reported_before_the_run_begins(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any, extra: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    config = msgspec.structs.replace(config, report_to=name)
    with pytest.raises(MissingExtraError, match=f"report_to {name} needs the package '{name}'") as raised:
        run_distillation(config, tmp_path / "run", resume=False)
    assert f"[{extra}]" in raised.value.hint
    assert not (tmp_path / "run" / "config.yaml").exists()


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    module = ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


def test_weights_and_biases_gets_the_run_by_its_own_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    class Run:
        id = "abc"

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *arguments, **options: calls.append((name, (*arguments, *options.items())))

    def init(**options: Any) -> Run:
        calls.append(("init", options))
        return Run()

    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    fake_module(monkeypatch, "wandb", init=init, Settings=dict)
    service = trackers.WandbService()
    assert service.open(tmp_path / "first", "abc", {"seed": 3}) == "abc"
    service.log(7, {"loss": 1.5})
    service.close("stopped")
    name, options = calls[0]
    assert name == "init"
    assert options.items() >= {
        "id": "abc", "resume": "allow", "project": "clip-rd-edge", "name": "first", "dir": tmp_path / "first",
        "config": {"seed": 3},
    }.items()  # fmt: skip
    assert ("log", ({"step": 7, "loss": 1.5},)) in calls
    assert ("define_metric", ("*", ("step_metric", "step"))) in calls
    assert calls[-1] == ("finish", (("exit_code", 1),))


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
    fake_module(monkeypatch, "wandb", login=login, setup=lambda settings: session, Settings=dict)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    if refused:
        with pytest.raises(UsageError, match="needs an API key") as raised:
            trackers.require_tracker("wandb")
        assert "WANDB_MODE=offline" in raised.value.hint
    else:
        trackers.require_tracker("wandb")


class FakeMLflow:
    """As much of MLflow's client as is called."""

    class Error(Exception):
        def __init__(self, error_code: str) -> None:
            super().__init__(error_code)
            self.error_code = error_code

    def __init__(self) -> None:
        self.params: dict[str, str] = {}
        self.metrics: list[tuple[str, float, int]] = []
        self.status: list[str] = []
        self.largest = 0
        self.deleted = False

    def get_experiment_by_name(self, name: str) -> None:
        assert name == "clip-rd-edge"

    def create_experiment(self, name: str) -> str:
        return "7"

    def create_run(self, experiment: str, *, run_name: str) -> SimpleNamespace:
        assert (experiment, run_name) == ("7", "first")
        return SimpleNamespace(info=SimpleNamespace(run_id="new"))

    def get_run(self, identity: str) -> SimpleNamespace:
        if identity == "gone":
            raise self.Error("RESOURCE_DOES_NOT_EXIST")
        if identity == "secret":
            raise self.Error("PERMISSION_DENIED")
        stage = "deleted" if identity == "deleted" else "active"
        return SimpleNamespace(info=SimpleNamespace(lifecycle_stage=stage))

    def update_run(self, identity: str, status: str) -> None:
        self.status.append(status)

    def log_batch(self, identity: str, metrics: Any = (), params: Any = ()) -> None:
        self.largest = max(self.largest, len(metrics), len(params))
        self.params |= dict(params)
        self.metrics += [(name, value, step) for name, value, _, step in metrics]

    def set_terminated(self, identity: str, status: str) -> None:
        self.status.append(status)


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMLflow:
    client = FakeMLflow()
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "1")
    fake_module(monkeypatch, "mlflow", MlflowClient=lambda: client)
    fake_module(monkeypatch, "mlflow.entities", Metric=lambda *row: row, Param=lambda *row: row)
    fake_module(monkeypatch, "mlflow.exceptions", MlflowException=FakeMLflow.Error)
    return client


def test_mlflow_gets_the_run_by_its_own_client(mlflow: FakeMLflow, tmp_path: Path) -> None:
    service = trackers.MLflowService()
    settings = {"recipe": {"objective": {"fd": 1.0}}, **{f"key{i}": "x" * 700 for i in range(120)}}
    assert service.open(tmp_path / "first", None, settings) == "new"
    assert mlflow.params["recipe.objective.fd"] == "1.0"
    assert len(mlflow.params) == 121
    assert max(map(len, mlflow.params.values())) == 500
    assert mlflow.largest == 100
    service.log(7, {"loss/fd": 1.5, "evaluation/emoji:unseen, style": 0.5})
    assert mlflow.metrics == [("loss/fd", 1.5, 7), ("evaluation/emoji_unseen_ style", 0.5, 7)]
    service.close("stopped")
    assert mlflow.status == ["KILLED"]


@pytest.mark.parametrize(
    ("identity", "opened"), [("mine", "mine"), ("gone", "new"), ("deleted", "new"), ("secret", None)]
)
def test_mlflow_continues_a_run_that_is_still_there(
    mlflow: FakeMLflow, tmp_path: Path, identity: str, opened: str | None
) -> None:
    service = trackers.MLflowService()
    if opened is None:
        with pytest.raises(FakeMLflow.Error):
            service.open(tmp_path / "first", identity, {})
        return
    assert service.open(tmp_path / "first", identity, {}) == opened
    assert mlflow.status == (["RUNNING"] if opened == identity else [])
