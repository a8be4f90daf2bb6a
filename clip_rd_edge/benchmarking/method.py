"""How it was measured, and what a careful reader should know."""

from __future__ import annotations

from clip_rd_edge.benchmarking.findings import better_than_a_guess
from clip_rd_edge.benchmarking.overview import heading
from clip_rd_edge.benchmarking.results import Results
from clip_rd_edge.benchmarking.scores import ZeroShotScore


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
        f"models timed in turn in one process, {latency.rounds} rounds. End to end is from a picture's file to its "
        f"embedding.",
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
