from __future__ import annotations

import numpy as np
import pytest

from clip_rd_edge.benchmarking.regression import (
    RELOAD_DEVIATION,
    STANDARD_ERRORS,
    change_noise,
    pooled_deviation,
    relative_change,
    run_noise,
)


def test_blocks_of_one_model_that_agree_by_chance_have_the_noise_of_all_models() -> None:
    scattered, alike = np.asarray([0.0, 0.1, -0.1, 0.05, -0.05]), np.full(5, 0.02)
    pooled = pooled_deviation([scattered, alike, scattered, alike])
    assert pooled == pytest.approx(np.sqrt(2 * (scattered**2).sum() / 16))
    alone, among_others = change_noise(alike, alike), change_noise(alike, alike, pooled=pooled)
    assert alone == pytest.approx(np.expm1(3.5 * np.sqrt(2) * RELOAD_DEVIATION))
    assert among_others > 3 * alone


@pytest.mark.parametrize("blocks", [8, 16, 64])
def test_the_noise_is_that_of_the_medians_of_so_many_blocks(blocks: int) -> None:
    ratios = np.tile([-0.1, 0.1], blocks // 2)
    mean_error = 0.1 * np.sqrt(1 / (blocks - 1))
    deviation = np.sqrt(2 * (RELOAD_DEVIATION**2 + np.pi / 2 * mean_error**2))
    assert change_noise(ratios, ratios) == pytest.approx(np.expm1(STANDARD_ERRORS * deviation))


def test_a_disturbed_block_is_no_change() -> None:
    assert relative_change(np.zeros(5), np.asarray([0, 0, 0, 0, 2.0])) == 0
    assert relative_change(np.zeros(5), np.log([1.5, 1.5, 1.5, 1.5, 9])) == pytest.approx(0.5)


def test_the_noise_of_a_run_is_that_of_its_most_scattered_row() -> None:
    quiet, scattered = np.tile([-0.01, 0.01], 8), np.tile([-0.1, 0.1], 8)
    assert run_noise([quiet, scattered]) == change_noise(scattered, scattered) > change_noise(quiet, quiet)
