"""Time the search for INT8, without a limit and with one, and compare what is chosen.

    OMP_NUM_THREADS=1 python -m benchmarks.devices.int8_search WORK -o benchmarks/results/MACHINE/int8-search.json \\
        --readme benchmarks/measurements/int8-search.md

A student, mobilevit_s at 224 pixels, and two published architectures, all with random weights whose norms' statistics
are settled. Each search is a process of its own, as in `published.py`, with an empty cache; its processor time and peak
memory include embeddings for calibration and comparison. WORK keeps what is done.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.devices import published
from benchmarks.publishing import add_output_options, here_and_now, publish

STUDENT = "mobilevit_s"
NAMES = (STUDENT, "MobileCLIP2-S0", "ViT-B-32")
WITHOUT_LIMIT = 60.0
MINUTES = (WITHOUT_LIMIT, 3.0, 1.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", type=Path, help="folder for what is done")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME")
    parser.add_argument("--minutes", nargs="+", type=float, default=list(MINUTES))
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)  # a process of its own: step, model, folder
    add_output_options(parser, "int8-search")
    arguments = parser.parse_args()
    if arguments.step:
        step, model, folder = arguments.step
        print(json.dumps(msgspec.to_builtins(published.run_step(step, model, 0, Path(folder)))))
        return
    work = arguments.work.resolve()
    rows: list[dict[str, Any]] = []
    for name in NAMES:
        folder = work / name
        for minutes in arguments.minutes:
            path = work / f"{name}-{minutes:g}.json"
            if not path.is_file() and name in arguments.only:
                model = written(name, folder)
                if not (folder / "FP32").is_dir():
                    run(folder, "FP32", model)
                shutil.rmtree(folder / "INT8", ignore_errors=True)
                path.write_text(json.dumps(run(folder, "INT8", model, minutes)), encoding="utf-8")
            if path.is_file():
                rows.append({"model": name, "minutes": minutes, **json.loads(path.read_text(encoding="utf-8"))})
    publish({**here_and_now(), "rows": rows}, table_of(rows), arguments)


def written(name: str, folder: Path) -> str:
    """Write a model with random weights, if it is not there yet; return what it is loaded by."""
    hub = folder / "hub"
    if name != STUDENT:
        if not hub.is_dir():
            published.random_model(name, hub)
        return f"{name}@{hub / 'open_clip_model.safetensors'}"
    if not hub.is_dir():
        import torch

        from clip_rd_edge.models.load import save_clip
        from clip_rd_edge.models.students import build_student, student_config

        torch.manual_seed(0)
        config = student_config(STUDENT, embedding_size=256, image_size=224, text="small", context_length=77)
        student = build_student(config, name=STUDENT)
        published.settle(student.model)
        save_clip(hub, student, provenance={})
    return f"local-dir:{hub}"


def run(folder: Path, step: str, model: str, minutes: float = WITHOUT_LIMIT) -> dict[str, Any]:
    print(f"{folder.name}: {step}, {minutes:g} min", file=sys.stderr, flush=True)
    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    environment = {**os.environ, "SEARCH_MINUTES": str(minutes), "XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.devices.int8_search", str(folder), "--step", step, model, str(folder)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = json.loads(done.stdout.decode().splitlines()[-1])
    if result.get("failed"):
        sys.exit(f"{folder.name}, {step}: {result['failed']}")
    return result


def table_of(rows: list[dict[str, Any]]) -> str:
    from clip_rd_edge.benchmarking.tables import markdown_table

    lines = [
        ["model", "limit, min", "processor time, min", "peak, GB", *(f"{tower} tower" for tower in ("image", "text"))]
    ]
    for row in rows:
        chosen = (row["towers"][tower] for tower in ("image", "text"))
        lines.append(
            [
                row["model"],
                "none" if row["minutes"] == WITHOUT_LIMIT else f"{row['minutes']:g}",
                f"{row['processor_seconds'] / 60:.1f}",
                f"{row['peak_bytes'] / 1e9:.1f}",
                *(f"{tower['precision']}, × {tower['ms'] / tower['fp32_ms']:.2f}" for tower in chosen),
            ]
        )
    return markdown_table(lines, left=(0, 4, 5))


if __name__ == "__main__":
    main()
