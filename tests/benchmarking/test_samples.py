from __future__ import annotations

from clip_rd_edge.benchmarking.report.html import page
from clip_rd_edge.benchmarking.report.text import markdown
from clip_rd_edge.benchmarking.results import Results


def test_only_classes_that_the_last_row_gets_wrong(results: Results) -> None:
    assert results.worst
    hits = results.rows[-1].marks[0].hits().reshape(6, 2)  # two pictures a colour
    assert len(results.worst) == int((~hits.all(axis=1)).sum())
    assert [each.right for each in results.worst] == sorted(each.right for each in results.worst)
    for each in results.worst:
        assert each.row == "INT8"
        assert each.right < each.images == 2
        assert each.label != each.taken_for
        assert each.png.startswith(b"\x89PNG")
        assert each.taken_for_png.startswith(b"\x89PNG")


def test_they_stand_in_both_reports(results: Results) -> None:
    first = results.worst[0]
    assert f"| {first.label} | {first.right} of 2 | {first.taken_for} |" in markdown(results, plot=False)
    assert f"<strong>{first.label}</strong> {first.right} of 2 right" in page(results)
