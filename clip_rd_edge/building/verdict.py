"""What a build has come to, in sentences: how good the student is, and what would help next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from clip_rd_edge.benchmarking.findings import above_chance, headline_score
from clip_rd_edge.benchmarking.metrics import RetrievalScore
from clip_rd_edge.benchmarking.results import Results, RowResult
from clip_rd_edge.building.look import Look

VERDICT = "verdict.md"
_WEAK = 0.5  # of a class's images: below, the class is named
_NAMED = 5


def verdict(found: Look, results: Results, label: str, *, max_latency: float | None) -> list[str]:
    """Return the verdict on a bundle, its first sentence first.

    Args:
        label: of the bundle's row; where this machine cannot run it, the verdict is on the student.
        max_latency: in milliseconds, if it can be measured here.
    """
    row = next((row for row in results.rows if row.label == label), None) or results.first("student")
    if row is None:
        return ["Neither the student nor its bundle could be measured: see the report for the reasons."]
    teacher = results.first("teacher")
    return [*_how_good(found, results, row, teacher, max_latency), *_what_next(found, results, row, teacher)]


def _how_good(
    found: Look, results: Results, row: RowResult, teacher: RowResult | None, max_latency: float | None
) -> Iterator[str]:
    size = f"{row.description.size_bytes / 1e6:.1f} MB"
    device = f"{size}, and its image tower takes {row.latency.image.p50:.1f} ms on this machine"
    score, reference = headline_score(results, row), teacher and headline_score(results, teacher)
    if score is None:
        yield f"{row.label}: {_recall(row)}{f', the teacher {_recall(teacher)}' if teacher else ''}; {device}."
    else:
        low, high = score.top1_interval.low, score.top1_interval.high
        right = "answers as its teacher does" if found.kind == "images" else "is right"
        against = f"; the teacher is, without training on them, on {reference.top1:.1%}" if reference else ""
        yield (
            f"{row.label} {right} on {score.top1:.1%} of {score.images:,} images that it was not trained on, among "
            f"{score.classes:,} labels (95 % interval {low:.0%} to {high:.0%})"
            f"{'' if found.kind == 'images' else against}; {device}."
        )
        if not above_chance(score):
            yield f"That is no better than chance, {1 / score.classes:.1%}: do not use it."
    if max_latency and row.latency.image.p50 > max_latency:
        yield f"Its image tower takes longer here than the {max_latency:g} ms that were asked for."


def _recall(row: RowResult) -> str:
    score = next((score for score in row.scores if isinstance(score, RetrievalScore)), None)
    return f"{score.image_to_text.at1:.1%} of {score.images:,} images find their caption first" if score else "-"


def _what_next(found: Look, results: Results, row: RowResult, teacher: RowResult | None) -> Iterator[str]:
    score, reference = (headline_score(results, one) if one else None for one in (row, teacher))
    if found.kind == "images":
        yield (
            "Nobody has said what is on the images, so the student can only become as good as its teacher: move the "
            "images in held-out/test into the right folders to see how good that is, or label some to train on."
        )
    counts = Counter(one.caption for one in found.of("train"))
    if weak := [entry for entry in results.weakest if (entry.recall or 0) < _WEAK]:
        taken = {one.label: next((name for name in one.predicted if name != one.label), "another") for one in weak}
        named = [f"{name} ({counts[name]} to train on, taken for {other})" for name, other in taken.items()][:_NAMED]
        yield f"More images would help most of: {', '.join(named)}."
    untested = sorted(set(found.labels) - {one.caption for one in found.of("test")})
    if found.kind == "classes" and untested:
        more = ", …" if len(untested) > _NAMED else ""
        yield f"No image of {len(untested):,} classes is in the test: {', '.join(untested[:_NAMED])}{more}."
    if score and reference and reference.top1_interval.low > score.top1:
        yield "The teacher is better than the student: a larger --student or --image-size would help."
    if score and score.images < 100:
        yield f"With {score.images:,} images held out, a few points are chance; more images would reduce that."
