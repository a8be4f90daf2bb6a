from pathlib import Path

import numpy as np
import pytest

from clip_rd_edge.contract.label_bank import LabelBank, read_labels, write_labels


@pytest.mark.parametrize("half", [False, True])
def test_a_label_bank_keeps_names_and_embeddings(tmp_path: Path, half: bool) -> None:
    rows = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    names = ("naïve café", "猫", *map(str, range(48)))
    write_labels(tmp_path, LabelBank(names, rows), half=half)
    bank = read_labels(tmp_path)
    assert bank is not None
    assert bank.names == names
    assert bank.embeddings.dtype == np.float32
    np.testing.assert_allclose(bank.embeddings, rows, rtol=5e-4 if half else 0, atol=1e-7 if half else 0)
