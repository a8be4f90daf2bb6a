from __future__ import annotations

import io
import re

import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image

from clip_rd_edge.benchmarking.plot import DARK, Dots, _pareto_front, draw, place_labels
from clip_rd_edge.benchmarking.results import Results


def test_the_same_results_give_an_identical_file(results: Results) -> None:
    assert draw(results, file_format="svg") == draw(results, file_format="svg")


def test_the_plot_has_the_colours_of_roles_and_background(results: Results) -> None:
    png = draw(results, file_format="png", palette=DARK)
    assert png is not None
    with Image.open(io.BytesIO(png)) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20) or []}
    for colour in (DARK.ground, DARK.roles["teacher"], DARK.roles["quantised"]):
        assert tuple(bytes.fromhex(colour[1:])) in colours


def test_results_without_a_zero_shot_task_have_no_plot(results: Results) -> None:
    rows = tuple(replace(row, scores=()) for row in results.rows[:1])
    assert draw(replace(results, rows=rows), file_format="png") is None


def test_pareto_front_excludes_dominated_models() -> None:
    x, y = np.asarray([10.0, 2.0, 5.0, 5.0, 1.0]), np.asarray([80.0, 60.0, 50.0, 70.0, 10.0])
    assert _pareto_front(x, y) == [4, 1, 3, 0]


def test_labels_of_nearby_dots_do_not_overlap() -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(6, 4))
    axes = figure.add_subplot(xlim=(0, 10), ylim=(0, 10))
    x = np.asarray([5.0, 5.6, 5.3])
    dots = Dots(x=x, y=np.full(3, 5.0), low=np.full(3, 4.5), high=np.full(3, 5.5), radii=np.full(3, 6.0))
    assert place_labels(axes, dots, ["first", "second", "third"], ["red", "green", "blue"])
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 3
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def test_names_that_do_not_fit_give_way_to_numbers_with_a_key(results: Results) -> None:
    def texts(results: Results) -> list[str]:
        svg = draw(results, file_format="svg")
        assert svg is not None
        return re.findall("<!-- (.*?) -->", svg.decode())  # which matplotlib writes beside the outlines of a text

    assert "Student" in texts(results)  # they fit
    rows = tuple(
        replace(row, label=f"ResNet-10-T, seed {seed}, {'with a bank of labels, ' * 3}{row.label}")
        for seed in range(3)
        for row in results.rows
    )
    shown = texts(replace(results, rows=rows))
    numbers = [str(number) for number in range(1, len(rows) + 1)]
    assert [text for text in shown if text in numbers] == numbers
    (first,) = [text for text in shown if text.startswith("15  ")]
    assert first == "15  ResNet-10-T, seed 2, with a bank of labels, with a bank of labels, with a bank"
    assert "of labels, INT8, 3.0 MB" in shown  # the key's lines are as wide as the plot, at most
