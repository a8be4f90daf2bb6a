from pathlib import Path

import msgspec
import numpy as np
import pytest

from clip_rd_edge.contract.bundle import read_manifest
from clip_rd_edge.contract.label_bank import LABELS, read_labels
from clip_rd_edge.runtime import load
from clip_rd_edge.runtime.label_bank import write_label_bank


@pytest.mark.parametrize(
    ("tower", "array", "dtype"),
    [
        ("fp32", "embeddings", np.float32),
        ("fp16", "embeddings", np.float16),
        ("bf16", "embeddings", np.float16),
        ("int8 dynamic with token table, by channel", "levels", np.int8),
    ],
)
def test_a_bank_is_stored_as_the_tower_computes(colour_bundle: Path, tower: str, array: str, dtype: type) -> None:
    manifest = read_manifest(colour_bundle)
    text = msgspec.structs.replace(manifest.text, precision=tower)
    write_label_bank(colour_bundle, msgspec.structs.replace(manifest, text=text), ["red", "blue", "red"])
    with np.load(colour_bundle / LABELS) as arrays:
        assert arrays[array].dtype == dtype
    bank = read_labels(colour_bundle)
    assert bank is not None
    assert bank.names == ("red", "blue")
    np.testing.assert_allclose(bank.embeddings, load(colour_bundle).encode_texts(["red", "blue"]), atol=0.5 / 127)
