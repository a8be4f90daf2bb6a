"""How a benchmark was measured, and what to know before quoting its numbers."""

from __future__ import annotations

from clip_rd_edge.benchmarking import formatting, statistics
from clip_rd_edge.benchmarking.metrics import ZeroShotScore
from clip_rd_edge.benchmarking.regression import BUSY, MEASUREMENTS
from clip_rd_edge.benchmarking.report.findings import above_chance, busy_remark
from clip_rd_edge.benchmarking.report.tables import heading
from clip_rd_edge.benchmarking.results import Results


def facts(results: Results) -> list[tuple[str, str]]:
    """Return the hardware and software as names and values."""
    environment = results.environment
    memory = f"{environment.memory_bytes / 2**30:.1f} GiB" if environment.memory_bytes else ""
    rows = [
        ("Machine", ", ".join(part for part in (environment.machine, memory) if part)),
        ("GPU", environment.accelerator),
        ("Instruction sets", ", ".join(environment.instruction_sets)),
        ("System", environment.system),
        ("Python", environment.python),
        ("Packages", ", ".join(f"{name} {version}" for name, version in environment.packages.items())),
        ("Threads", str(results.suite.threads)),
        ("Date", environment.date),
        ("Commit", environment.commit),
    ]
    return [(name, value) for name, value in rows if value]


def remarks(results: Results) -> list[str]:
    """Return what a careful reader should know before quoting a number."""
    suite, latency = results.suite, results.rows[0].latency
    notes = [
        *_chance_remarks(results),
        f"Latency: batch 1 on {suite.threads} thread{'s' if suite.threads > 1 else ''}; all models timed in turn in "
        f"one process, {latency.rounds} rounds, after warming up until the latency was steady. End to end is from the "
        f"image file to the {'label' if latency.steps else 'embedding'}.",
        *_reliability_remarks(results),
    ]
    runtimes: dict[str, list[str]] = {}
    for row in results.rows:
        runtimes.setdefault(row.description.runtime, []).append(row.label)
    if len(runtimes) > 1:
        assignment = "; ".join(f"{', '.join(labels)} in {runtime}" for runtime, labels in runtimes.items())
        notes.append(f"Models ran in different runtimes ({assignment}), which account for part of the speed-ups.")
    notes.append("Size: the files needed to run the model, without the runtime's own libraries.")
    notes += _template_remarks(results)
    if results.comparisons:
        notes.append(
            "Intervals are 95 % confidence intervals over the task's images; those of differences are "
            "paired by image. They do not cover other training seeds or other images."
        )
    return notes


def _reliability_remarks(results: Results) -> list[str]:
    """Return how reliable the figures are, and which could not be measured."""
    notes = []
    if (noise := latency_noise(results)) is not None:
        notes.append(
            f"Noise: the p50s of two runs like this one can differ by up to {formatting.share(noise, 1)} by chance, "
            f"relative to a fixed reference workload that is timed beside the models."
        )
    elif results.reference is not None:
        notes.append("Noise: unknown, as a single round does not show it; latencies of more rounds can be compared.")
    notes += busy_remark(results, above=BUSY)
    rows = results.rows
    if rows[0].throughput and any(row.energy_joules is None for row in rows):
        if any(row.energy_joules is None and row.description.device == "cpu" for row in rows):
            notes.append("Energy: not available on this machine (no readable counter in /sys/class/powercap).")
        else:
            notes.append("Energy: of models on the CPU alone; what other devices take is not in its counters.")
    if cold_starts := [row.cold_start for row in rows if row.cold_start]:
        notes.append(
            f"Cold start and memory: a new process that does its imports, loads the model and embeds one image and one "
            f"text, with its files in the system's cache; median of up to "
            f"{max(cold_start.runs for cold_start in cold_starts)} runs."
        )
    return notes


def latency_noise(results: Results) -> float | None:
    """Return how much any row's p50 can differ between two such runs by chance, as a fraction; None if unknown."""
    if results.reference is None or len(results.reference.image) < statistics.MIN_BLOCKS:
        return None
    models = {
        field: [
            statistics.log_ratios(measured.blocks, getattr(results.reference, field))
            for row in results.rows
            if (measured := getattr(row.latency, field))
        ]
        for field in MEASUREMENTS
    }
    return max(statistics.run_noise(ratios) for ratios in models.values() if ratios)


def worst_note(results: Results) -> str:
    """Return what the section of the worst classes shows."""
    first = results.worst[0]
    return (
        f"{heading(first.task)}, {first.row}: the classes with the lowest accuracy; among equals, those with the most "
        f"confident errors."
    )


def samples_note(results: Results) -> str:
    """Return how the samples were chosen."""
    last = results.samples[0].answers[-1].row
    correct = sum(sample.answers[-1].right for sample in results.samples)
    wrong = len(results.samples) - correct
    return (
        f"{heading(results.samples[0].task)}, sampled at random: {correct} images that {last} classifies correctly and "
        f"{wrong} that it gets wrong, so the ratio is not its accuracy. Each prediction is shown with its probability."
    )


def _template_remarks(results: Results) -> list[str]:
    """Return the prompt templates, unless labels were embedded as they are."""
    scores = [s for s in results.rows[0].scores if isinstance(s, ZeroShotScore) and s.templates not in ("", "{}")]
    if not scores:
        return []
    return [f"Prompt templates: {'; '.join(f'{score.task}: {score.templates}' for score in scores)}."]


def _chance_remarks(results: Results) -> list[str]:
    at_chance: dict[str, list[str]] = {}
    for row in results.rows:
        for score in row.scores:
            if isinstance(score, ZeroShotScore) and not above_chance(score):
                at_chance.setdefault(score.task, []).append(row.label)
    return [f"Not significantly above chance level on {task}: {', '.join(rows)}." for task, rows in at_chance.items()]
