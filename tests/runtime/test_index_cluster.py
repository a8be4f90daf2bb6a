"""An index that a cluster's workers embed is that of one machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import VNNI_ALONE, one_worker, rewrite

from clip_rd_edge.bundle.manifest import read_manifest
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
    rewrite(colour_bundle, logit_scale=7.0)
    with pytest.raises(InputError, match="differs on this machine"):
        embed._make_worker(colour_bundle, manifest)


def test_a_worker_that_embeds_images_wrongly_is_refused(colour_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = rewrite(colour_bundle, image=VNNI_ALONE)
    monkeypatch.setattr("clip_rd_edge.runtime.backends.onnxruntime.processor_saturates", lambda: True)
    with pytest.raises(UsageError, match="gives wrong answers here"):
        embed._make_worker(colour_bundle, manifest)
