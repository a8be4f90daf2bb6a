from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.mathtext import MathTextParser
from torch.utils._python_dispatch import TorchDispatchMode

from clip_rd_edge.bundle.runs import EVALUATION_PREFIX, METRICS_FILE
from clip_rd_edge.distillation.metrics import mean_similarities, plot_run


class LargestTensor(TorchDispatchMode):
    """Records the number of entries of the largest tensor that an operation returns."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.entries = max(self.entries, output.numel() if isinstance(output, torch.Tensor) else 0)
        return output


def test_the_geometry_is_the_mean_over_matching_and_other_pairs_without_a_matrix_of_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(300, 8, generator=generator) + 0.3) for _ in range(2))
    cosines, matching = image @ text.T, torch.eye(300, dtype=torch.bool)
    with LargestTensor() as largest:
        positive, negative = mean_similarities(image, text)
    assert positive == pytest.approx(cosines[matching].mean().item(), abs=1e-6)
    assert negative == pytest.approx(cosines[~matching].mean().item(), abs=1e-6)
    assert largest.entries <= 300 * 8


def test_a_single_pair_has_no_negatives() -> None:
    one = torch.nn.functional.normalize(torch.ones(1, 4))
    positive, negative = mean_similarities(one, one)
    assert positive == pytest.approx(1)
    assert negative != negative  # NaN


pytestmark = pytest.mark.usefixtures("plots")


@pytest.mark.parametrize("task", ["100$%$", "from $5 to $9", r"\$5"])
def test_the_name_of_a_task_is_no_formula(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formulas: list[str] = []
    parse = MathTextParser.parse

    def recorded(self: Any, text: str, *args: Any, **options: Any) -> Any:
        formulas.append(text)
        return parse(self, text, *args, **options)

    monkeypatch.setattr(MathTextParser, "parse", recorded)
    (tmp_path / METRICS_FILE).write_text(json.dumps({"step": 1, EVALUATION_PREFIX + task: 0.5}) + "\n")
    plot_run(tmp_path, tmp_path / "report")
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"evaluation.png"}
    assert formulas == []
