"""How well models notice images of nothing that the labels name, and what their calibration is worth on other labels.

    python -m benchmarks.devices.none_of_these teacher=quickstart/teacher student=quickstart/student \\
        "student, INT8=quickstart/bundles/int8" everyday --photos photos \\
        -o benchmarks/results/MACHINE/none-of-these.json --readme benchmarks/measurements/none-of-these.md

PHOTOS is what `python -m benchmarks.data.tuxpaint photos` writes; emoji and scikit-learn's digits are the other images.
Of each data set, half of the labels are hidden in five draws: images of these have no right answer. Scores are chosen
on one half of each (emoji of an unseen style, the photographs `choose`, even digits) and shown on the other. 128 images
of the first half calibrate the answers, as an export does, which are tried with 5, 20 and 300 labels of each half.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

import clip_rd_edge as edge
from benchmarks.publishing import add_output_options, here_and_now, publish
from clip_rd_edge.benchmarking.metrics import average_precision, calibration_error, false_positives, separation
from clip_rd_edge.benchmarking.tables import markdown_table
from clip_rd_edge.bundle.encoder import Scoring, label_embeddings, usual_limit
from clip_rd_edge.bundle.labels import background_nouns
from clip_rd_edge.data.tasks import load_task
from clip_rd_edge.exporting.calibration import calibrate
from clip_rd_edge.utils.paths import Typed

Arrays = dict[str, npt.NDArray[Any]]
HALVES = {"emoji": ("unseen style", "unseen concepts"), "photographs": ("choose", "test"), "digits": ("even", "odd")}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DRAWS, PAIRS, SIZES, REFUSE = 5, 128, (5, 20, 300), 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure rejection and calibration.")
    parser.add_argument("models", nargs="+", help="NAME=MODEL, or a model")
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--every", type=int, default=1, help="take one in so many images")
    parser.add_argument("--cache", type=Path, default=Path("none-of-these"), help="folder for embeddings")
    add_output_options(parser, "none-of-these", required=True)
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    found = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {"models": {}}
    for word in arguments.models:
        name, _, model = word.rpartition("=")
        path = arguments.cache / f"{name or model}.npz"
        if not path.is_file():
            np.savez(path, **embed(model, arguments.photos, arguments.every))  # type: ignore[arg-type]
        with np.load(path) as arrays:
            found["models"][name or model] = measured(dict(arrays))
    publish({**found, **here_and_now(), "draws": DRAWS, "pairs": PAIRS}, tables(found["models"]), arguments)


def embed(model: str, photos: Path, every: int) -> Arrays:
    """Embed all images and labels of a model, by `DATA/HALF/images`, `…/labels` and `…/targets`."""
    from sklearn.datasets import load_digits

    encoder = edge.load(model).encoder
    description = encoder.describe()
    arrays: Arrays = {"scale": np.array(description.logit_scale)}

    def labels(names: Any) -> Any:
        return label_embeddings(encoder, list(names), description.templates)

    arrays["nouns"] = labels(background_nouns())
    names = {"emoji": "emoji:unseen-{}", "photographs": str(photos / "tasks" / "{}")}
    for data, pattern in names.items():
        for half in HALVES[data]:
            task: Any = load_task(Typed(pattern.format(half.removeprefix("unseen "))))
            opened = [Image.open(path).convert("RGB") for path in task.images[::every]]
            arrays[f"{data}/{half}/images"] = np.concatenate(
                [encoder.encode_images(opened[at : at + 32]) for at in range(0, len(opened), 32)]
            )
            arrays[f"{data}/{half}/targets"] = np.array(task.targets[::every])
            arrays[f"{data}/{half}/labels"], arrays[f"{data}/{half}/names"] = labels(task.labels), np.array(task.labels)
    digits = load_digits()
    for parity, half in enumerate(HALVES["digits"]):
        rows = range(parity, 250, 2)
        images = [Image.fromarray((digits.images[i] / 16 * 255).astype(np.uint8)).resize((64, 64)) for i in rows]
        arrays[f"digits/{half}/images"] = encoder.encode_images([image.convert("RGB") for image in images])
        arrays[f"digits/{half}/targets"] = digits.target[list(rows)]
        arrays[f"digits/{half}/labels"] = labels(f"the digit {name}" for name in DIGITS)
        arrays[f"digits/{half}/names"] = np.array(DIGITS)
    return arrays


def measured(arrays: Arrays) -> dict[str, Any]:
    scoring, nouns = Scoring(float(arrays["scale"])), arrays["nouns"]
    found: dict[str, Any] = {}
    for data, halves in HALVES.items():
        calibration = None
        for half in halves:
            images, targets, labels, names = (
                arrays[f"{data}/{half}/{key}"] for key in ("images", "targets", "labels", "names")
            )
            right = float(((images @ labels.T).argmax(axis=1) == targets).mean())
            entry: dict[str, Any] = {"images": len(images), "labels": len(labels), "top1": round(right, 3)}
            if half == halves[0]:
                chosen = np.random.default_rng(0).permutation(len(images))[:PAIRS]
                pairs = images[chosen], labels[targets[chosen]]
                calibration = calibrate(*pairs, nouns, scoring, source=half)
            entry["hidden"] = hidden(images, targets, labels, nouns, scoring)
            if calibration is not None:
                keys = ("temperature", "slope", "intercept", "error_before", "error")
                entry["calibration"] = {key: getattr(calibration, key) for key in keys}
            entry["lists"] = lists(images, targets, labels, nouns, scoring, calibration, pairs[0])
            entry["nothing"] = nothing(images, targets, labels, names, nouns, scoring, calibration, pairs[0])
            found[f"{data}, {half}"] = entry
    return found


def scores(images: Any, labels: Any, nouns: Any, scoring: Scoring) -> dict[str, Any]:
    """Return the scores that an image's best answer may have, (N,) each; the higher, the likelier it is known."""
    cosines, usual = images @ labels.T, images @ nouns.T
    logits = scoring.scale * cosines
    total = np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1))
    far = (labels @ nouns.T).max(axis=0) <= np.quantile((labels @ nouns.T).max(axis=0), 0.8)
    negatives = np.log(np.exp(scoring.scale * usual[:, far]).sum(axis=1))
    return {
        "max softmax": -total,
        "max cosine": cosines.max(axis=1),
        "energy": total + logits.max(axis=1),
        "MCM": np.exp(cosines.max(axis=1)) / np.exp(cosines).sum(axis=1),
        "NegLabel": total + logits.max(axis=1) - negatives,
        "cosine, standardised by nouns": (cosines.max(axis=1) - usual.mean(axis=1)) / usual.std(axis=1),
        "background": scoring.matches(images, labels, nouns).max(axis=1),
    }


def hidden(images: Any, targets: Any, labels: Any, nouns: Any, scoring: Scoring) -> dict[str, Any]:
    """Return AUROC and FPR at 95 % of each score, with half of the labels hidden."""
    found: dict[str, dict[str, list[float]]] = {}
    for draw in range(DRAWS):
        shown = np.random.default_rng(draw).permutation(len(labels))[: len(labels) // 2]
        known = np.isin(targets, shown)
        for name, values in scores(images, labels[shown], nouns, scoring).items():
            entry = found.setdefault(name, {"auroc": [], "fpr95": []})
            entry["auroc"].append(separation(values[known], values[~known]))
            entry["fpr95"].append(false_positives(values[known], values[~known]))
    return {name: {key: summary(values) for key, values in entry.items()} for name, entry in found.items()}


def summary(values: list[float]) -> list[float]:
    """Return the mean and the 95 % interval of the mean over draws (Student's t)."""
    half = 2.776 * float(np.std(values, ddof=1)) / len(values) ** 0.5
    mean = float(np.mean(values))
    return [round(mean, 3), round(mean - half, 3), round(mean + half, 3)]


def lists(
    images: Any, targets: Any, labels: Any, nouns: Any, scoring: Scoring, calibration: Any, known_images: Any
) -> dict[str, Any]:
    """Return what lists of labels get: shares refused, calibration errors, mAP of several labels."""
    found: dict[str, Any] = {}
    matches = scoring.matches(images, labels, nouns)
    usual = scoring.matches(images, nouns, nouns)
    for size in SIZES:
        rows: dict[str, list[float]] = {}
        count = min(size, len(labels))
        for draw in range(2 * DRAWS):
            shown = np.random.default_rng(100 + draw).permutation(len(labels))[:count]
            known, best = np.isin(targets, shown), matches[:, shown].max(axis=1)
            if known.sum() < 5:
                continue
            limits = {"rough": usual_limit(usual, count)[:, 0]}
            own = targets[known][:, None] == shown
            rows.setdefault("mAP", []).append(average_precision(matches[known][:, shown], own))
            if calibration is not None:
                others = scoring.matches(known_images, labels[shown], nouns).max(axis=1)
                limits["calibrated"] = np.full(len(images), calibration.limit(others, REFUSE))
                for name, used in (("before", scoring), ("after", calibration.softened(scoring))):
                    values = used.probabilities(images[known], labels[shown])
                    hits = own[np.arange(len(own)), values.argmax(axis=1)]
                    rows.setdefault(f"ECE {name}", []).append(calibration_error(values.max(axis=1), hits))
                alone = calibration.probabilities(matches[known][:, shown])
                rows.setdefault("ECE by itself", []).append(calibration_error(alone.ravel(), own.ravel()))
            for name, limit in limits.items():
                refused = best < limit
                rows.setdefault(f"{name}: known refused", []).append(float(refused[known].mean()))
                if not known.all():
                    rows.setdefault(f"{name}: others refused", []).append(float(refused[~known].mean()))
        found[f"{count} labels"] = {name: summary(values) for name, values in rows.items() if len(values) > 1}
    return found


def nothing(
    images: Any, targets: Any, labels: Any, names: Any, nouns: Any, scoring: Scoring, calibration: Any, known: Any
) -> list[dict[str, Any]]:
    """Return what ten images of hidden labels are answered, among half of the labels, or twenty."""
    order = np.random.default_rng(0).permutation(len(labels))
    shown = order[: min(20, len(labels) // 2)]
    others = np.flatnonzero(~np.isin(targets, shown))
    found, used = [], calibration.softened(scoring) if calibration else scoring
    for row in np.random.default_rng(1).permutation(others)[:10]:
        image = images[row : row + 1]
        values, best = (
            used.probabilities(image, labels[shown])[0],
            scoring.matches(image, labels[shown], nouns).max(),
        )
        limit = (
            calibration.limit(scoring.matches(known, labels[shown], nouns).max(axis=1), REFUSE)
            if calibration is not None
            else usual_limit(scoring.matches(image, nouns, nouns), len(shown))[0, 0]
        )
        answer = {"first": str(names[shown[values.argmax()]]), "softmax": round(float(values.max()), 2)}
        found.append({"shows": str(names[targets[row]]), **answer, "refused": bool(best < limit)})
    return found


def tables(models: dict[str, Any]) -> str:
    """Return what the measurement's page shows: scores, lists of labels, and images of nothing that is named."""

    def share(figures: dict[str, Any], key: str) -> str:
        return f"{100 * figures[key][0]:.0f}" if key in figures else "–"

    parts = []
    for data, (chosen, shown) in HALVES.items():
        rows = [[f"{data}: score", *models]]
        for score in next(iter(models.values()))[f"{data}, {chosen}"]["hidden"]:
            cells = []
            for found in models.values():
                first, second = (found[f"{data}, {half}"]["hidden"][score] for half in (chosen, shown))
                mean, low, high = second["auroc"]
                interval = f"{mean:.2f} ({low:.2f} to {high:.2f})"
                cells.append(f"{first['auroc'][0]:.2f}, {interval}; {share(second, 'fpr95')} %")
            rows.append([f"**{score}** (used)" if score == "background" else score, *cells])
        right = ([100 * found[f"{data}, {half}"]["top1"] for half in (chosen, shown)] for found in models.values())
        top1 = [f"{first:.0f} % and {second:.0f} %" for first, second in right]
        parts.append(markdown_table([*rows, ["top-1 among all labels", *top1]], left=(0,)))
    columns = ["calibrated: known", "calibrated: others", "rough: known", "rough: others"]
    errors = ["ECE before", "ECE after", "ECE by itself", "mAP"]
    rows = [["model", "images", "labels", *columns, *errors]]
    for model, found in models.items():
        for part in (f"{data}, {half}" for data in ("emoji", "photographs") for half in HALVES[data]):
            for size, figures in found[part]["lists"].items():
                refused = [share(figures, f"{column} refused") for column in columns]
                rows.append([model, part, size.split()[0], *refused, *(share(figures, key) for key in errors)])
    parts.append(markdown_table(rows, left=(0, 1)))
    rows = [["model", "pairs of", "temperature", "ECE before", "after"]]
    for model, found in models.items():
        for part in (f"{data}, {halves[0]}" for data, halves in HALVES.items()):
            if fitted := found[part].get("calibration"):
                errors = [f"{100 * fitted[key]:.1f}" for key in ("error_before", "error")]
                rows.append([model, part, f"{fitted['temperature']:.2f}", *errors])
    parts.append(markdown_table(rows, left=(0, 1)))
    for model, part in (("everyday", "photographs, test"), ("student, INT8", "emoji, unseen concepts")):
        rows = [[f"{model}; {part}: the image shows", "without `--none`", "with"]]
        for image in models.get(model, {}).get(part, {}).get("nothing", ()):
            first = f"{image['first']} ({100 * image['softmax']:.0f} %)"
            rows.append([image["shows"], first, "none of these" if image["refused"] else first])
        parts.append(markdown_table(rows, left=(0, 1, 2)))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
