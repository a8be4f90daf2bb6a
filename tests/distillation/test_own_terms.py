"""A run whose recipe weighs a loss term of the user's own file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import timm
from support import Watch
from tiny_runs import stop_at

import clip_rd_edge as edge
from clip_rd_edge.bundle.runs import read_metrics
from clip_rd_edge.errors import ClipRdEdgeError, ConfigError, UsageError
from clip_rd_edge.losses import terms

OWN_NET = """
import timm
from torch import nn

class Net(nn.Sequential):
    num_features = 16

    def reset_classifier(self, num_classes, global_pool=""):
        pass

@timm.models.register_model
def own_net(pretrained=False, **options):
    return Net(nn.Conv2d(3, 16, 3, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

"""
EXAMPLE = Path(__file__).parents[2] / "examples" / "own_term.py"


@pytest.fixture(autouse=True)
def _terms_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terms, "_TERMS", dict(terms._TERMS))


def test_an_own_image_tower_needs_a_default_cfg_and_is_imported_to_be_measured(pairs_csv: Path, tmp_path: Path) -> None:
    own = tmp_path / "own_net.py"
    own.write_text(OWN_NET)
    options = {"data": pairs_csv, "recipe": "clip", "image_size": 32, "text": "64x1", "context_length": 8, "steps": 1}
    options |= {"batch_size": 6, "precision": "fp32", "workers": 0, "output": tmp_path / "run", "terms": own}
    with pytest.raises(ConfigError, match="default_cfg"):
        edge.distill(**options, student="own_net")
    own.write_text(OWN_NET + 'Net.default_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}')
    edge.distill(**options, student="own_net")
    timm.models._registry._model_entrypoints.pop("own_net")  # as in another process
    with pytest.raises(ClipRdEdgeError):
        edge.evaluate(tmp_path / "run", pairs_csv)
    (score,) = edge.evaluate(tmp_path / "run", pairs_csv, modules=own)
    assert score.images == 24


def test_an_own_term_is_trained_logged_and_known_by_its_code(pairs_csv: Path, tmp_path: Path) -> None:
    mine, recipe, run = tmp_path / "mine.py", tmp_path / "mine.yaml", tmp_path / "run"
    shutil.copy(EXAMPLE, mine)
    recipe.write_text("objective: {task: 1, margin: 0.5}\n")
    options = {
        "data": pairs_csv, "recipe": recipe, "student": "test_resnet", "image_size": 32, "text": "64x1",
        "context_length": 8, "embedding_size": 8, "batch_size": 6, "steps": 4, "precision": "fp32", "workers": 0,
        "checkpoint_every": 2, "output": run,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="unknown loss term 'margin'"):
        edge.distill(**options)
    with pytest.raises(MemoryError):
        edge.distill(**options, terms=mine, reporter=Watch(on_step=stop_at(3)))
    mine.write_text(mine.read_text().replace("0.2", "0.3"))
    with pytest.raises(UsageError, match="the loss term margin has other code"):
        edge.distill(**options, terms=mine, resume=True)
    terms._TERMS.pop("margin")
    with pytest.raises(ConfigError, match="unknown loss term 'margin'"):  # what a run records is not run
        edge.distill(**options, resume=True)
    shutil.copy(EXAMPLE, mine)
    mine = mine.rename(tmp_path / "moved.py")
    edge.distill(**options, terms=[mine], resume=True)
    with pytest.raises(UsageError, match="has no teacher"):  # its terms are known
        edge.embed(data=pairs_csv, recipe=recipe, terms=mine, teacher="ViT-B-32@openai", output=tmp_path / "store")
    lines = read_metrics(run)
    assert all(line["loss"] == pytest.approx(line["loss/task"] + 0.5 * line["loss/margin"]) for line in lines)
