"""How it was measured, and what a careful reader should know."""

from __future__ import annotations

from clip_rd_edge.benchmarking import formatting as formats
from clip_rd_edge.benchmarking import statistics as noise
from clip_rd_edge.benchmarking.metrics import ZeroShotScore
from clip_rd_edge.benchmarking.regression import BUSY
from clip_rd_edge.benchmarking.report.findings import better_than_a_guess
from clip_rd_edge.benchmarking.report.tables import heading
from clip_rd_edge.benchmarking.results import Results


def facts(results: Results) -> list[tuple[str, str]]:
    """Machine and software, as names and values."""
    environment = results.environment
    memory = f"{environment.memory_bytes / 2**30:.1f} GiB" if environment.memory_bytes else ""
    found = [
        ("Machine", ", ".join(part for part in (environment.machine, memory) if part)),
        ("Instruction sets", ", ".join(environment.instruction_sets)),
        ("System", environment.system),
        ("Python", environment.python),
        ("Packages", ", ".join(f"{name} {version}" for name, version in environment.packages.items())),
        ("Threads", str(results.suite.threads)),
        ("Date", environment.date),
        ("Commit", environment.commit),
    ]
    return [(name, value) for name, value in found if value]


def remarks(results: Results) -> list[str]:
    """What a careful reader should know before quoting a number."""
    suite, latency = results.suite, results.rows[0].latency
    notes = [
        *_guesses(results),
        f"Latency: one picture or text at a time, on {suite.threads} thread{'s' if suite.threads > 1 else ''}, all "
        f"models timed in turn in one process, {latency.rounds} rounds, after warming up until they are steady. End to "
        f"end is from a picture's file to its {'label' if latency.steps else 'embedding'}.",
        *_noise(results),
    ]
    runtimes: dict[str, list[str]] = {}
    for row in results.rows:
        runtimes.setdefault(row.description.runtime, []).append(row.label)
    if len(runtimes) > 1:
        used = "; ".join(f"{', '.join(labels)} in {runtime}" for runtime, labels in runtimes.items())
        notes.append(f"Models ran {used}: between these, part of a speed-up is the runtime's.")
    notes.append("Size: what has to lie on disk to run the model, the runtime's own libraries left out.")
    notes += _templates(results)
    if results.comparisons:
        notes.append(
            "Intervals are 95 %, by bootstrap over the task's pictures; those of differences are paired, picture by "
            "picture. They do not cover other seeds of training or other pictures than these."
        )
    return notes


def _noise(results: Results) -> list[str]:
    """How far the figures can be trusted, and what the machine did not tell."""
    notes = []
    if (found := noise_figure(results)) is not None:
        notes.append(
            f"Noise: by chance, p50s of two such runs differ by up to {formats.share(found, 1)}, each taken as a "
            f"multiple of a fixed piece of work that is timed beside the models."
        )
    if results.other_load is not None and results.other_load > BUSY:
        notes.append(
            f"The machine was busy: other processes took {formats.share(results.other_load, 1)} of its time while "
            f"models were timed. Latencies are too high, and unevenly so."
        )
    rows = results.rows
    if rows[0].throughput and all(row.energy_joules is None for row in rows):
        notes.append("Energy: this machine does not tell (/sys/class/powercap has no counter that may be read).")
    if cold := [row.cold_start for row in rows if row.cold_start]:
        notes.append(
            f"Cold start and memory: a new process that imports, loads, and embeds one picture and one text, with its "
            f"files in the system's cache; the median of up to {max(each.runs for each in cold)}."
        )
    return notes


def noise_figure(results: Results) -> float | None:
    """What two such runs may differ by in any row's p50, as a fraction; None where it was not measured."""
    if results.reference is None:
        return None
    kinds = ("image", "text", "end_to_end")
    return max(
        noise.of_one_run(
            [noise.paces(getattr(row.latency, kind).sittings, getattr(results.reference, kind)) for row in results.rows]
        )
        for kind in kinds
    )


def worst_note(results: Results) -> str:
    """What is shown of the worst classes."""
    first = results.worst[0]
    return (
        f"{heading(first.task)}, {first.row}: classes of which it gets the fewest pictures right, and of these "
        f"those that it was surest to call something else."
    )


def samples_note(results: Results) -> str:
    """How the samples were chosen."""
    last = results.samples[0].answers[-1].row
    right = sum(sample.answers[-1].right for sample in results.samples)
    wrong = len(results.samples) - right
    return (
        f"{heading(results.samples[0].task)}, drawn by lot: {right} that {last} gets right and {wrong} that it gets "
        f"wrong, so these are not its accuracy. Each answer stands with its probability."
    )


def _templates(results: Results) -> list[str]:
    """What labels were put into, where the task had a say or needed a stand-in."""
    said = [s for s in results.rows[0].scores if isinstance(s, ZeroShotScore) and s.templates not in ("", "{}")]
    return [f"Templates: {'; '.join(f'{score.task}: {score.templates}' for score in said)}."] if said else []


def _guesses(results: Results) -> list[str]:
    guessing: dict[str, list[str]] = {}
    for row in results.rows:
        for score in row.scores:
            if isinstance(score, ZeroShotScore) and not better_than_a_guess(score):
                guessing.setdefault(score.task, []).append(row.label)
    return [f"Not clearly better than a guess on {task}: {', '.join(rows)}." for task, rows in guessing.items()]
