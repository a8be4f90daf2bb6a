"""A small evidence suite and synthetic results of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from clip_rd_edge.benchmarking.metrics import Interval, Recall, RetrievalScore, ZeroShotScore
from clip_rd_edge.benchmarking.results import this_environment
from clip_rd_edge.evidence.suite import (
    Curve,
    Evidence,
    EvidenceSuite,
    Geometry,
    Method,
    ModelResult,
    RunResult,
    TaskResult,
)

IMAGES = 20
Make = Callable[[dict[tuple[str, int], int]], Evidence]


@pytest.fixture
def suite() -> EvidenceSuite:
    """A suite of three methods, two seeds and one student."""
    return EvidenceSuite(
        name="small",
        data="emoji",
        tasks=("emoji:unseen-style", "emoji:unseen-style:retrieval"),
        students=("test_vit",),
        methods=(
            Method(name="none", recipe="clip"),
            Method(name="clip-rd", recipe="clip-rd"),
            Method(name="clip-rd-without-xrd", recipe="clip-rd", weights={"xrd": 0}),
        ),
        compare_with=("none",),
        seeds=(0, 1),
        steps=2,
        batch_size=6,
        learning_rate=1e-3,
        precision="fp32",
        image_size=32,
        text="64x1",
        context_length=12,
        embedding_size=24,
        views=1,
        evaluate_every=1,
        log_every=1,
    )


@pytest.fixture
def make(suite: EvidenceSuite) -> Make:
    """Return a function that makes evidence from the finished runs: {(method, seed): correct images, of 20}."""

    def evidence(correct: dict[tuple[str, int], int]) -> Evidence:
        runs = [_run(method, seed, model_result(method, hits)) for (method, seed), hits in correct.items()]
        return Evidence(suite=suite, teacher=model_result("teacher", 15), runs=tuple(runs))

    return evidence


def model_result(name: str, correct: int) -> ModelResult:
    """Return the result of a model that classifies the first `correct` images correctly."""
    top1 = correct / IMAGES
    zero_shot = ZeroShotScore(
        task="emoji, unseen style",
        images=IMAGES,
        classes=IMAGES,
        top1=top1,
        top1_interval=Interval(top1, top1),
        top5=top1,
        mean_per_class=top1,
        templates="{}",
        calibration_error=None,
    )
    recall = Recall(at1=top1, at5=None, at10=None)
    retrieval = RetrievalScore(
        task="emoji, unseen style, retrieval",
        images=IMAGES,
        captions=IMAGES,
        image_to_text=recall,
        text_to_image=recall,
    )
    tasks = (
        TaskResult(content="", images="unseen style", score=zero_shot, hits="1" * correct + "0" * (IMAGES - correct)),
        TaskResult(content="", images="", hits="", score=retrieval, geometry=Geometry(positive=0.5, negative=-0.125)),
    )
    return ModelResult(model=name, parameters=1, tasks=tasks)


def _run(method: str, seed: int, result: ModelResult) -> RunResult:
    names = ("student_positive", "student_negative", "evaluation/emoji, unseen style")
    return RunResult(
        student="test_vit",
        method=method,
        seed=seed,
        cpu_seconds=90.0,
        result=result,
        curves={name: Curve(steps=(1, 2), values=(0.1, 0.2)) for name in names},
        environment=this_environment(),
    )
