"""What has changed from one run of a suite to another, told from noise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec
import numpy as np

from clip_rd_edge.benchmarking import formatting as formats
from clip_rd_edge.benchmarking import statistics as noise
from clip_rd_edge.benchmarking.accuracy import Marks
from clip_rd_edge.benchmarking.metrics import Interval, difference_interval
from clip_rd_edge.benchmarking.results import Results, RowResult
from clip_rd_edge.errors import InputError

Verdict = Literal["regression", "improvement", "noise", "same"]
VISIBLE = 0.15  # a change that a comparison should be able to tell
TOO_BUSY = 0.25  # above, calls are interrupted so often that no statistics of theirs tell anything
BUSY = 0.05  # of the machine's time: above, latencies are not the models' alone
KINDS = {"image": "image tower", "text": "text tower", "end_to_end": "end to end"}


class LatencyChange(msgspec.Struct, frozen=True, kw_only=True):
    """A p50 of a row in both runs.

    Attributes:
        old_ms, new_ms: as each run measured it.
        change: how much longer the new one takes, as a fraction, each as a multiple of the reference of its own run.
        noise: what `change` may be by chance.
    """

    row: str
    what: str
    old_ms: float
    new_ms: float
    change: float
    noise: float
    verdict: Verdict


class AccuracyChange(msgspec.Struct, frozen=True, kw_only=True):
    """Right answers of a row in both runs, as fractions.

    Attributes:
        interval: of `new - old`, by bootstrap, paired question by question, as wide as the number of comparisons asks.
    """

    row: str
    task: str
    measure: str
    old: float
    new: float
    interval: Interval
    verdict: Verdict


class Changes(msgspec.Struct, frozen=True, kw_only=True):
    """All changes.

    Attributes:
        lost: rows that the new run did not measure, with the reason; each is a regression.
        remarks: what was not compared, and what to know about the rest.
        regressions: how many of all kinds.
    """

    latencies: tuple[LatencyChange, ...]
    accuracies: tuple[AccuracyChange, ...]
    lost: dict[str, str]
    remarks: tuple[str, ...]
    regressions: int


def compare_runs(old: Results, new: Results) -> Changes:
    """Every row that both runs have, by its label.

    Raises:
        InputError: they have no row in common.
    """
    now = {row.label: row for row in new.rows}
    pairs = [(row, now[row.label]) for row in old.rows if row.label in now]
    if not pairs:
        raise InputError(
            f"The two results have no model in common: {_labels(old)} and {_labels(new)}.",
            hint="compare two runs of one suite",
        )
    reasons = {row.label: row.reason for row in new.skipped}
    lost = {row.label: reasons.get(row.label, "It is not in the suite.") for row in old.rows if row.label not in now}
    why_not = _why_no_latency(old, new)
    remarks = [*why_not, *_unlike(old, new), *([] if why_not else _pace(old, new))]
    accuracies = _accuracies(pairs)
    if unpaired := [row.label for row, _ in pairs if row.label not in {each.row for each in accuracies}]:
        remarks.append(f"Accuracy is not compared, as no task has the same questions in both runs: {_join(unpaired)}.")
    latencies = () if why_not else tuple(_latencies(old, new, pairs))
    if noisy := sum(each.noise > VISIBLE for each in latencies):
        remarks.append(
            f"{noisy} of {len(latencies)} latencies are so noisy that a change of {formats.share(VISIBLE, 1)} would "
            f"not be seen: time both runs again on a quiet machine."
        )
    return Changes(
        latencies=latencies,
        accuracies=accuracies,
        lost=lost,
        remarks=tuple(remarks),
        regressions=len(lost) + [each.verdict for each in latencies + accuracies].count("regression"),
    )


def _latencies(old: Results, new: Results, pairs: list[tuple[RowResult, RowResult]]) -> Iterator[LatencyChange]:
    for kind, name in KINDS.items():
        before = {row.label: _paces(old, row, kind) for row, _ in pairs}
        after = {row.label: _paces(new, row, kind) for _, row in pairs}
        pooled = noise.pooled_deviation([*before.values(), *after.values()])
        for one, other in pairs:
            changed = noise.change(before[one.label], after[one.label])
            by_chance = noise.noise(before[one.label], after[one.label], pooled=pooled)
            slower, faster = changed > by_chance, changed < 1 / (1 + by_chance) - 1
            yield LatencyChange(
                row=one.label,
                what=name,
                old_ms=getattr(one.latency, kind).p50,
                new_ms=getattr(other.latency, kind).p50,
                change=changed,
                noise=by_chance,
                verdict="regression" if slower else "improvement" if faster else "noise",
            )


def _paces(results: Results, row: RowResult, kind: str) -> noise.Paces:
    return noise.paces(getattr(row.latency, kind).sittings, getattr(results.reference, kind))


def _accuracies(pairs: list[tuple[RowResult, RowResult]]) -> tuple[AccuracyChange, ...]:
    found = [(one.label, before, after) for one, other in pairs for before, after in _paired(one, other)]
    # Some of many intervals of 95 % would lie beside 0 by chance.
    level = 1 - 0.05 / max(len(found), 1)
    return tuple(_accuracy(label, before, after, level=level) for label, before, after in found)


def _paired(one: RowResult, other: RowResult) -> Iterator[tuple[Marks, Marks]]:
    after = {(each.task, each.measure, each.questions): each for each in other.marks}
    for before in one.marks:
        same = after.get((before.task, before.measure, before.questions))
        if same is not None:
            yield before, same


def _accuracy(row: str, before: Marks, after: Marks, *, level: float) -> AccuracyChange:
    old, new = before.hits(), after.hits()
    interval = difference_interval(new, old, level=level)
    same = bool((old == new).all())
    worse, better = interval.high < 0, interval.low > 0
    return AccuracyChange(
        row=row,
        task=before.task,
        measure=before.measure,
        old=float(old.mean()),
        new=float(new.mean()),
        interval=interval,
        verdict="same" if same else "regression" if worse else "improvement" if better else "noise",
    )


def _why_no_latency(old: Results, new: Results) -> list[str]:
    """Why latencies cannot be compared, or nothing."""
    if old.reference is None or new.reference is None:
        return ["Latency is not compared: one result was written before the machine's own pace was measured with it."]
    for name, run in (("old", old), ("new", new)):
        if run.other_load is not None and run.other_load > TOO_BUSY:
            taken = formats.share(run.other_load, 1)
            return [
                f"Latency is not compared: other processes took {taken} of the machine during the {name} run; time it "
                f"again on a quiet machine."
            ]
    unlike = [
        (what, one, other)
        for what, one, other in (
            ("machines", old.environment.machine, new.environment.machine),
            ("numbers of threads", old.suite.threads, new.suite.threads),
        )
        if one != other
    ]
    return [f"Latency is not compared: the {what} differ, {one} and {other}." for what, one, other in unlike]


def _unlike(old: Results, new: Results) -> list[str]:
    before, after = old.environment.packages, new.environment.packages
    differing = [
        f"{name} {before.get(name, 'none')} → {after.get(name, 'none')}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]
    if not differing:
        return []
    note = " The reference runs in ONNX Runtime, so that its change counts as the machine's."
    return [f"Packages differ: {', '.join(differing)}.{note if 'onnxruntime' in ' '.join(differing) else ''}"]


def _pace(old: Results, new: Results) -> list[str]:
    assert old.reference is not None
    assert new.reference is not None
    remarks = []
    before, after = np.median(old.reference.image), np.median(new.reference.image)
    if abs(after / before - 1) >= 0.01:
        slower = "slower" if after > before else "faster"
        remarks.append(
            f"The machine itself was {formats.share(abs(after / before - 1), 1)} {slower}, which is taken out."
        )
    for name, run in (("old", old), ("new", new)):
        if run.other_load is not None and run.other_load > BUSY:
            remarks.append(
                f"Other processes took {formats.share(run.other_load, 1)} of the machine during the {name} run."
            )
    return remarks


def _labels(results: Results) -> str:
    return _join([row.label for row in results.rows])


def _join(labels: list[str]) -> str:
    return ", ".join(labels)
