from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from losses_in_numpy import LargestTensor

from clip_rd_edge.bundle.runs import METRICS_FILE
from clip_rd_edge.distillation.metrics import last_evaluation, mean_similarities


def test_a_student_has_no_scores_of_an_earlier_step(tmp_path: Path) -> None:
    lines = {"step": 1, "evaluation/task": 0.5}, {"step": 2, "loss": 1.0}
    (tmp_path / METRICS_FILE).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert [last_evaluation(tmp_path, step=step) for step in (1, 2)] == [{"task": 0.5}, {}]


def test_the_geometry_is_the_mean_over_matching_and_other_pairs_without_a_matrix_of_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(300, 8, generator=generator) + 0.3) for _ in range(2))
    cosines, matching = image @ text.T, torch.eye(300, dtype=torch.bool)
    with LargestTensor() as largest:
        positive, negative = mean_similarities(image, text)
    assert positive == pytest.approx(cosines[matching].mean().item(), abs=1e-6)
    assert negative == pytest.approx(cosines[~matching].mean().item(), abs=1e-6)
    assert largest.entries <= 300 * 8
