from __future__ import annotations

from pathlib import Path

import pytest

from clip_rd_edge.api.models import open_encoder
from clip_rd_edge.errors import UsageError


def test_a_bundle_runs_in_the_requested_runtime(colour_bundle: Path) -> None:
    assert open_encoder(str(colour_bundle), threads=1, runtime="onnxruntime").describe().runtime == "onnxruntime"


def test_a_bundle_does_not_run_in_torch(colour_bundle: Path) -> None:
    with pytest.raises(UsageError, match="is a bundle, which torch cannot run"):
        open_encoder(str(colour_bundle), runtime="torch")
