from __future__ import annotations

from clip_rd_edge.benchmarking.report import markdown, page
from clip_rd_edge.benchmarking.results import Results


def test_worst_classes_are_those_with_errors_of_the_last_row(results: Results) -> None:
    assert results.worst
    hits = results.rows[-1].correctness[0].hits().reshape(6, 2)  # two images per colour
    assert len(results.worst) == int((~hits.all(axis=1)).sum())
    assert [worst.right for worst in results.worst] == sorted(worst.right for worst in results.worst)
    for worst in results.worst:
        assert worst.row == "INT8"
        assert worst.right < worst.images == 2
        assert worst.label != worst.taken_for
        assert worst.png.startswith(b"\x89PNG")
        assert worst.taken_for_png.startswith(b"\x89PNG")


def test_worst_classes_are_in_both_reports(results: Results) -> None:
    first = results.worst[0]
    assert f"| {first.label} | {first.right} of 2 | {first.taken_for} |" in markdown(results, plot=False)
    assert f"<strong>{first.label}</strong> {first.right} of 2 correct" in page(results)
