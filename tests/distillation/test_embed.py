"""A teacher's store has the same bytes whoever computes it: a run, `embed`, or the workers of a cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import one_worker, save_tiny_teacher

import clip_rd_edge as edge
from clip_rd_edge.distillation import store
from clip_rd_edge.errors import InputError


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 pairs make three shards of images and of texts."""
    monkeypatch.setattr(store, "SHARD_SIZE", 10)


@pytest.fixture
def source(pairs_csv: Path, tmp_path: Path) -> dict[str, Any]:
    save_tiny_teacher(tmp_path / "teacher")
    return {"data": str(pairs_csv), "teacher": str(tmp_path / "teacher"), "views": 2, "seed": 5, "workers": 0}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_embed_fills_the_store_of_a_run_which_then_takes_its_precision(source: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"image_size": 48, "text": "64x1", "context_length": 12, "batch_size": 6, "steps": 2}
    stored = edge.embed(output=tmp_path / "embedded", **source, precision="bf16")
    run = edge.distill(
        student="test_vit", output=tmp_path / "first", store=str(tmp_path / "filled"), precision="bf16",
        **source, **sizes,
    )  # fmt: skip
    assert contents(stored) == contents(tmp_path / "filled")
    assert (run / "student").is_dir()
    edge.distill(student="test_vit", output=tmp_path / "second", store=str(stored), **source, **sizes)
    assert "teacher_precision: bf16" in (tmp_path / "second" / "config.yaml").read_text()


def test_a_store_for_a_student_that_squeezes_images_holds_its_crops(source: dict[str, Any], tmp_path: Path) -> None:
    vision = {"timm_model_name": "test_resnet", "timm_pool": "", "timm_proj": "linear"}
    preprocessing = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    student = tmp_path / "student.json"
    student.write_text(json.dumps({"vision_cfg": vision, "preprocess_cfg": preprocessing}))
    stored = edge.embed(student=str(student), output=tmp_path / "stored", **source)
    (manifest,) = stored.rglob("manifest.json")
    assert json.loads(manifest.read_text())["crops"]["aspect_ratio"] is None  # that of the image
    sizes = {"image_size": 48, "text": "64x1", "context_length": 12, "batch_size": 6, "steps": 1}
    edge.distill(student=str(student), output=tmp_path / "run", store=str(stored), **source, **sizes)


def test_a_worker_with_other_data_is_refused(
    source: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_another_machine(*arguments: Any) -> Iterator[Any]:
        table = Path(source["data"])
        table.write_text(table.read_text().replace("number 7", "number 8"))
        return one_worker(*arguments)

    monkeypatch.setattr("clip_rd_edge.utils.cluster.map_on_cluster", on_another_machine)
    with pytest.raises(InputError, match="differs on this machine"):
        edge.embed(output=tmp_path / "store", ray="auto", **source)


def test_the_workers_of_a_cluster_give_the_same_bytes(
    source: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source["teacher"] = [source["teacher"], str(save_tiny_teacher(tmp_path / "second", seed=2))]
    here = edge.embed(output=tmp_path / "here", **source)
    monkeypatch.setattr("clip_rd_edge.utils.cluster.map_on_cluster", one_worker)
    assert contents(edge.embed(output=tmp_path / "there", ray="auto", **source)) == contents(here)


CLUSTER = """
import json, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
import clip_rd_edge as edge
from clip_rd_edge.distillation import store
from clip_rd_edge.errors import InputError
store.SHARD_SIZE = 10  # here; a worker is told its rows
options, output = json.loads(sys.argv[1]), Path(sys.argv[2])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
second = cluster.add_node(num_cpus=1)

def lose_the_second():
    while not any(output.glob("images/*/*.npy")):
        time.sleep(0.05)
    cluster.remove_node(second, allow_graceful=False)
    print("lost", len(list(output.glob("images/*/*.npy"))), flush=True)

threading.Thread(target=lose_the_second, daemon=True).start()
edge.embed(output=output, ray=cluster.address, **options)
print("nodes", sum(node["Alive"] for node in ray.nodes()), flush=True)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_ray_cluster_of_two_nodes_gives_the_same_bytes_though_one_is_lost(
    source: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    source = {**source, "views": 6}
    expected = contents(edge.embed(output=tmp_path / "here", **source))
    script = tmp_path / "cluster.py"
    script.write_text(CLUSTER)
    result = subprocess.run(
        [sys.executable, str(script), json.dumps(source), str(tmp_path / "there")],
        # Ray's workers are as nice as 15 by default, and would wait for whatever else a busy machine does.
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"},
        capture_output=True,
        text=True,
        timeout=1500,  # a worker's first import takes long on a busy machine,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert contents(tmp_path / "there") == expected
    assert "nodes 1" in result.stdout
