"""An index that a cluster's workers embed is that of one machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image
from support import one_worker

import clip_rd_edge as edge
from clip_rd_edge.bundle.manifest import read_manifest, write_manifest
from clip_rd_edge.errors import InputError, UsageError
from clip_rd_edge.runtime import load as embed
from clip_rd_edge.runtime.index import read_index
from clip_rd_edge.runtime.index_update import update_index
from clip_rd_edge.runtime.load import load


def test_the_workers_of_a_cluster_give_the_same_index(
    colour_bundle: Path, colour_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (colour_images / "broken.png").write_bytes(b"not an image")
    here = update_index(load(colour_bundle), colour_images, tmp_path / "here")
    monkeypatch.setattr("clip_rd_edge.utils.cluster.map_on_cluster", one_worker)
    monkeypatch.setattr(embed, "BATCH_SIZE", 2)
    monkeypatch.setattr(embed, "_CHUNK_BATCHES", 1)
    there = update_index(load(colour_bundle), colour_images, tmp_path / "there", cluster="auto")
    assert there == here
    (first, rows), (second, same_rows) = read_index(tmp_path / "here"), read_index(tmp_path / "there")
    assert first.entries == second.entries
    assert np.array_equal(rows, same_rows)


def test_a_worker_with_another_bundle_is_refused(colour_bundle: Path) -> None:
    manifest = read_manifest(colour_bundle)
    write_manifest(colour_bundle, msgspec.structs.replace(manifest, logit_scale=7.0))
    with pytest.raises(InputError, match="is another one here"):
        embed._make_worker(colour_bundle, manifest)


def test_a_worker_that_embeds_images_wrongly_is_refused(colour_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(colour_bundle)
    image = msgspec.structs.replace(manifest.image, instruction_sets=("x86-64-vnni", "aarch64"))
    manifest = write_manifest(colour_bundle, msgspec.structs.replace(manifest, image=image))
    monkeypatch.setattr("clip_rd_edge.runtime.backends.onnxruntime.processor_saturates", lambda: True)
    with pytest.raises(UsageError, match="gives wrong answers here"):
        embed._make_worker(colour_bundle, manifest)


CLUSTER = """
import json, sys, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
import clip_rd_edge as edge
from clip_rd_edge.runtime import load as embed
embed.BATCH_SIZE, embed._CHUNK_BATCHES = 2, 1  # here; a worker is told its images
bundle, images, output, fate = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
second = cluster.add_node(num_cpus=1)

def works_on_the_second():
    return any(
        actor["State"] == "ALIVE" and actor["Address"]["NodeID"] == second.node_id
        for actor in ray._private.state.actors().values()
    )

class LoseTheSecond(edge.Reporter):
    lost = fate == "keep"

    def update(self, stage, step=0, total=None, message=""):
        if self.lost or not step or stage != "embedding":
            return
        self.lost = True
        deadline = time.monotonic() + 300
        while not works_on_the_second() and time.monotonic() < deadline:
            time.sleep(0.05)
        cluster.remove_node(second, allow_graceful=False)
        print("lost at", step, "of", total, flush=True)

print(edge.index(bundle, images, output, ray=cluster.address, reporter=LoseTheSecond()), flush=True)
print("nodes", sum(node["Alive"] for node in ray.nodes()), flush=True)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.parametrize("fate", ["keep", "lose"])
def test_a_ray_cluster_of_two_nodes_gives_the_same_index_though_one_is_lost(
    colour_bundle: Path, tmp_path: Path, fate: str
) -> None:
    pytest.importorskip("ray")
    images = tmp_path / "large"
    images.mkdir()
    for i in range(40):
        Image.new("RGB", (1500, 1500), (6 * i, 255 - 6 * i, 50)).save(images / f"{i:02d}.png")
    (images / "broken.png").write_bytes(b"not an image")
    expected = edge.index(colour_bundle, images, tmp_path / "here")
    script = tmp_path / "cluster.py"
    script.write_text(CLUSTER)
    result = subprocess.run(
        [sys.executable, str(script), str(colour_bundle), str(images), str(tmp_path / "there"), fate],
        # Ray's workers are as nice as 15 by default, and would wait for whatever else a busy machine does.
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"},
        capture_output=True,
        text=True,
        timeout=1500,  # a worker's first import takes long on a busy machine
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert str(expected) in result.stdout
    (first, rows), (second, same_rows) = read_index(tmp_path / "here"), read_index(tmp_path / "there")
    assert first.entries == second.entries
    assert np.array_equal(rows, same_rows)
    assert f"nodes {2 if fate == 'keep' else 1}" in result.stdout
    assert (fate == "lose") == ("lost at" in result.stdout)
