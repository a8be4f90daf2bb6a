"""The job files of examples/ are valid, and act on the exit codes of a run as they say."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from clip_rd_edge.cli.main import cli

EXAMPLES = Path(__file__).parents[2] / "examples"
SBATCH, POD = EXAMPLES / "slurm" / "distil.sbatch", EXAMPLES / "kubernetes" / "distil.yaml"
RANKS_OF_SLURM = {"SLURM_JOB_NODELIST": "a,b", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7", "SLURM_PROCID": "5"}


def program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
    (folder / name).chmod((folder / name).stat().st_mode | stat.S_IXUSR)


def parse_distill(arguments: list[str]) -> dict[str, Any]:
    assert arguments[0] == "distill"
    command = cli.get_command(click.Context(cli), "distill")
    assert command is not None
    return command.make_context("distill", arguments[1:]).params


@pytest.mark.parametrize("code", [0, 1, 75])
def test_the_slurm_job_requeues_itself_after_a_run_that_was_saved_alone(tmp_path: Path, code: int) -> None:
    program(tmp_path, "scontrol", 'if [ "$1" = show ]; then echo node-a; else echo "$@" > "$OUT/requeued"; fi')
    program(tmp_path, "srun", 'SLURM_LOCALID=1 "$@"')
    program(tmp_path, "clip-rd-edge", f'env > "$OUT/env"; printf "%s\\n" "$@" > "$OUT/arguments"; exit {code}')
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(tmp_path), "DATA": "/data", "SCRATCH": "/s"}
    result = subprocess.run(["bash", str(SBATCH)], env={**variables, **RANKS_OF_SLURM})
    assert result.returncode == code
    assert (tmp_path / "requeued").exists() == (code == 75)
    environment = dict(line.partition("=")[::2] for line in (tmp_path / "env").read_text().splitlines())
    ranks = {name: environment[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    assert ranks == {
        "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "node-a", "MASTER_PORT": "20007"
    }  # fmt: skip
    told = parse_distill((tmp_path / "arguments").read_text().splitlines())
    assert told["resume"]
    assert told["batch_size"] == 1024
    assert str(told["output"]) == "/s/runs/clip-rd-vit-tiny"


@pytest.fixture
def job() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(POD.read_text())
    return content


def test_its_pods_are_valid_by_the_schema_of_kubernetes(job: dict[str, Any]) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for name, replica in job["spec"]["pytorchReplicaSpecs"].items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name.lower()}, **replica["template"]}
        validate.validate(pod, validate.latest_version(), strict=True)


def shell(job: dict[str, Any], command: list[str]) -> list[str]:
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    return [*container["command"], *container["args"][:2], *command]


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (1, 138), (2, 2), (75, 138)])
def test_exit_codes_that_a_restart_mends_are_retryable(job: dict[str, Any], code: int, expected: int) -> None:
    assert subprocess.run(shell(job, ["sh", "-c", f"exit {code}"])).returncode == expected


def test_sigterm_reaches_the_run_whose_exit_code_is_waited_for(job: dict[str, Any], tmp_path: Path) -> None:
    run = (
        f"trap 'sleep 0.3; touch {tmp_path}/saved; exit 75' TERM; touch {tmp_path}/ready; while :; do sleep 0.05; done"
    )
    process = subprocess.Popen(shell(job, ["sh", "-c", run]))
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 138
    assert (tmp_path / "saved").exists()
