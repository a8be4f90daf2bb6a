"""Several teachers as one: what their embeddings are side by side."""

from __future__ import annotations

import numpy as np
import torch
from losses_in_numpy import rows

from clip_rd_edge.losses.objective import Objective, Weights
from clip_rd_edge.losses.terms import Ensemble, side_by_side, teacher_parts

ROWS, WIDTHS = 5, (4, 3)
IMAGES, TEXTS = ([rows(ROWS, width, seed + 10 * k) for k, width in enumerate(WIDTHS)] for seed in (2, 3))


def test_a_student_of_another_width_is_projected_to_all_teachers_together() -> None:
    objective = Objective(Weights(fd=1), widths=(6, *WIDTHS))
    assert objective.image_projection.weight.shape == (sum(WIDTHS), 6)
    assert not Objective(Weights(fd=1), widths=(sum(WIDTHS), *WIDTHS)).has_projections


def test_side_by_side_has_unit_rows_whose_cosines_are_mean_cosines_and_parts_give_the_teachers_back() -> None:
    images, texts = side_by_side(IMAGES), side_by_side(TEXTS)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(ROWS, dtype=torch.float64))
    cosines = [v @ t.T for v, t in zip(IMAGES, TEXTS, strict=True)]
    torch.testing.assert_close(images @ texts.T, torch.stack(cosines).mean(0))
    for part, teacher in zip(teacher_parts(images, WIDTHS), IMAGES, strict=True):
        torch.testing.assert_close(part, teacher)
    assert side_by_side(IMAGES[:1]) is IMAGES[0]


def test_teachers_that_share_a_text_tower_are_one_whose_similarities_are_in_proportion_to_the_mean_of_theirs() -> None:
    first, second, texts = (rows(ROWS, 4, seed) for seed in (2, 3, 4))
    alike = Ensemble((4, 4), (10.0, 14.0), share_text=True)
    assert (alike.widths, alike.logit_scale) == ((4,), 12.0)
    images = alike.join([first, second])
    v, t = ((first.numpy() + second.numpy()) / 2, texts.numpy())
    lengths = np.sqrt((v**2).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(images.numpy(), v / lengths, atol=1e-9)
    cosines = (first.numpy() @ t.T + second.numpy() @ t.T) / 2
    np.testing.assert_allclose((images @ texts.T).numpy() * lengths, cosines, atol=1e-9)
    np.testing.assert_allclose(alike.join([texts, texts]).numpy(), t, atol=1e-9)
    assert not alike.join([torch.zeros(2, 4), torch.zeros(2, 4)]).any()  # of texts alone, without images
    apart = Ensemble((4, 3), (10.0, 14.0))
    assert (apart.widths, apart.logit_scale) == ((4, 3), (10.0, 14.0))
    assert Ensemble((4,), (10.0,)).logit_scale == 10.0
    assert Ensemble((4,), (10.0,)).join([first]) is first
