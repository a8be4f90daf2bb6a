"""The page of a run: its charts, its words, and what of them comes from elsewhere."""

from __future__ import annotations

import math
import os
import re
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from clip_rd_edge.utils.lock import lock_content
from clip_rd_edge.web.watch.app import make_app
from clip_rd_edge.web.watch.charts import Chart, axis_ticks, draw, series
from clip_rd_edge.web.watch.page import number, percent, render, rough_duration
from clip_rd_edge.web.watch.state import Answers, SampleAnswer, read_run

HOSTILE = '<script>alert("x")</script>'


@pytest.fixture
def run(make_run: Callable[..., Path], tmp_path: Path) -> Path:
    run = make_run(tmp_path / "first")
    (run / ".lock").write_text(lock_content(os.getpid()))
    return run


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0, 1.0], [0, 0.25, 0.5, 0.75, 1.0]),
        ([12.3, 47.8], [10, 20, 30, 40, 50]),
        ([0.005, 0.0151], [0.005, 0.01, 0.015, 0.02]),
        ([-1.0, 1.0], [-1, -0.5, 0, 0.5, 1]),
        ([3.0, 3.0], [1, 2, 3, 4, 5]),
        ([0.0], [-0.5, -0.25, 0, 0.25, 0.5]),
    ],
)
def test_ticks_are_round_even_and_enclose_the_values(values: list[float], ticks: list[float]) -> None:
    assert axis_ticks(values) == pytest.approx(ticks)


def test_ticks_begin_at_the_floor() -> None:
    assert axis_ticks([0.3, 0.4], floor=0.0)[0] == 0
    assert axis_ticks([0.0, 0.0], floor=0.0)[0] == 0


def test_a_series_has_the_finite_values_of_a_key() -> None:
    lines = [
        {"step": 1, "a": 2.0},
        {"step": 2},
        {"step": 3, "a": None},
        {"step": 4, "a": math.nan},
        {"step": 5, "a": 1},
    ]
    assert series(lines, "a") == [(1, 2.0), (5, 1.0)]


def test_a_chart_draws_its_points_where_they_belong() -> None:
    figure = ElementTree.fromstring(draw(Chart("loss", [(0, 4.0), (50, 2.0), (100, 0.0)], number), steps=200))
    paths = {path.get("class"): path.get("d") for path in figure.iter("path")}
    assert paths["curve"] == "M0.0 0.0L250.0 500.0L500.0 1000.0"
    assert paths["dots"] == "M0.0 0.0h0M250.0 500.0h0M500.0 1000.0h0"
    assert paths["grid"] == "M0 0.0h1000M0 250.0h1000M0 500.0h1000M0 750.0h1000M0 1000.0h1000"
    labels = [span.text for span in figure.iter("span")]
    assert labels == ["4", "3", "2", "1", "0", "0", "200 steps"]
    (svg,) = figure.iter("svg")
    assert svg.get("aria-label") == "loss: from 4 at step 0 to 0 at step 100"


def test_a_long_curve_is_averaged_and_an_empty_one_is_not_drawn() -> None:
    points = [(step, 5.0 + (step % 2)) for step in range(3001)]
    curve = re.search(r'class="curve" d="([^"]*)"', draw(Chart("x", points, number), steps=3001))
    assert curve
    assert 200 < curve[1].count("L") < 300
    assert draw(Chart("x", [], number), steps=10) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (62, "1 min"),
        (200, "3 min 20 s"),
        (3600, "1 h"),
        (3905, "1 h 5 min"),
        (2e5, "2 d 7 h"),
    ],
)
def test_times_left_are_rounded_to_5_s(seconds: float, text: str) -> None:
    assert rough_duration(seconds) == text


def test_numbers_have_three_significant_digits() -> None:
    assert [number(x) for x in (0, 12.345, 1234.5, 0.00012345, -2.0)] == ["0", "12.3", "1,230", "0.000123", "-2"]
    assert [percent(x) for x in (0, 0.305, 1)] == ["0 %", "30.5 %", "100 %"]


class Parsed(HTMLParser):
    """Collects the elements and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_tells_how_far_the_run_is_and_what_the_student_answers(run: Path) -> None:
    sample = SampleAnswer(png=b"png", truth="a cat", answer="a dog", probability=0.625, right=False)
    answers = Answers(step=20, among="among the 2 labels of pets", samples=(sample,))
    page = Parsed(render(read_run(run), answers, served=False))
    assert "20 of 50 steps, about 15 s left." in page.text
    assert "The student after step 20, among the 2 labels of pets." in page.text
    assert "a dog, 62.5 %" in page.text
    assert ("progress", {"aria-label": "Completed steps", "max": "50", "value": "20"}) in page.elements
    names = [attributes["aria-label"] for tag, attributes in page.elements if tag == "svg"]
    assert names[0] == "total: from 2.75 at step 5 to 2 at step 20"


@pytest.mark.parametrize("quiet_s", [30, 180])
def test_a_run_that_logs_nothing_new_is_not_told_to_be_nearly_done(run: Path, quiet_s: int) -> None:
    now = time.time()
    os.utime(run / "metrics.jsonl", (now, now - quiet_s))
    page = Parsed(render(read_run(run), Answers(), served=False)).text
    if quiet_s < 60:
        assert "20 of 50 steps, about 10 s left." in page  # as it would be at step 30, whose line does not come
    else:
        assert "20 of 50 steps, and nothing new for 3 min: the run is evaluating or saving, or it hangs" in page
        assert "left." not in page


def test_a_run_that_has_diverged_is_not_said_to_go_on(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(tmp_path / "first")
    assert "--resume continues it" in Parsed(render(read_run(run), Answers(), served=False)).text
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step":25,"loss":null,"loss/task":null}\n')
    page = Parsed(render(read_run(run), Answers(), served=False))
    assert "--resume" not in page.text
    assert "its loss was not finite. Begin a new run, with another -o, with a lower learning rate" in page.text
    names = [attributes["aria-label"] for tag, attributes in page.elements if tag == "svg"]
    assert names == ["total, last finite value: from 2.75 at step 5 to 2 at step 20"]


def test_a_run_whose_last_step_is_done_is_saving(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(tmp_path / "first", logged=50)
    (run / ".lock").write_text(lock_content(os.getpid()))
    page = Parsed(render(read_run(run), Answers(), served=False)).text
    assert "50 of 50 steps: the last step is done; the student is being saved." in page


def test_the_file_is_complete_in_itself(run: Path) -> None:
    page = Parsed(render(read_run(run), Answers(), served=False))
    assert not [tag for tag, _ in page.elements if tag in ("script", "link")]
    assert not [
        attributes for _, attributes in page.elements if attributes.get("src", "") or attributes.get("href", "")
    ]


def test_names_of_unknown_origin_are_shown_and_not_obeyed(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("pairs.csv", repr(HOSTILE)))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step":21,"evaluation/<script>":0.5,"loss/<script>":1.0}\n')
    sample = SampleAnswer(png=b"", truth=HOSTILE, answer=HOSTILE, probability=0.5, right=True)
    for answers in (Answers(step=1, among=HOSTILE, samples=(sample,)), Answers(problem=HOSTILE)):
        page = render(read_run(run), answers, served=False)
        assert "<script" not in page
        assert HOSTILE in Parsed(page).text


def test_a_secret_in_the_address_of_the_data_is_not_shown(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    address = "https://user:SECRET@a.example/{0..9}.tar?sig=SECRET"
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("pairs.csv", repr(address)))
    page = render(read_run(run), Answers(), served=False)
    assert "https://a.example/{0..9}.tar" in Parsed(page).text
    assert "SECRET" not in page


def test_the_served_page_obeys_its_own_policy_and_follows_the_run(run: Path) -> None:
    client = TestClient(make_app(run, Answers), base_url="http://127.0.0.1:1")
    response = client.get("/")
    policy = response.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "style=" not in response.text  # which the policy forbids, as it does <style>
    assert "<style" not in response.text
    for _, attributes in Parsed(response.text).elements:
        for name in (attributes.get("src"), attributes.get("href")):
            if name and not name.startswith("data:"):
                assert client.get(f"/{name}").status_code == 200
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step":25,"loss":1.5}\n')
    assert "25 of 50 steps" in Parsed(client.get("/").text).text


def test_foreign_hosts_and_other_files_are_refused(run: Path) -> None:
    client = TestClient(make_app(run, Answers), base_url="http://127.0.0.1:1")
    assert client.get("/", headers={"host": "evil.example"}).status_code == 403
    assert client.get("/config.yaml").status_code == 404
    assert client.get("/page.html").status_code == 404


def test_a_run_that_is_removed_meanwhile_is_a_sentence(run: Path) -> None:
    client = TestClient(make_app(run, Answers), base_url="http://127.0.0.1:1")
    run.rename(run.with_name("elsewhere"))
    response = client.get("/")
    assert response.status_code == 500
    assert "does not exist." in response.text
