from __future__ import annotations

import pytest

from clip_rd_edge.benchmarking import tables as formatting
from clip_rd_edge.benchmarking.metrics import Interval


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (formatting.percent(0.71849), "71.8"),
        (formatting.percent(None), "–"),
        (formatting.share(1, 4), "25\u00a0%"),
        (formatting.share(1, 0), "–"),
        (formatting.signed_points(-0.0131), "−1.3"),
        (formatting.signed_points(0.35), "+35.0"),
        (formatting.signed_points(-0.0001), "0.0"),
        (formatting.interval(Interval(-0.01, 0.5)), "−1.0 to 50.0"),
        (formatting.interval(Interval(-0.0, 0.5)), "0.0 to 50.0"),
        (formatting.three_digits(1.7834), "1.78"),
        (formatting.three_digits(32.46), "32.5"),
        (formatting.three_digits(1234.5), "1,234"),
        (formatting.megabytes(7_612_345), "7.6"),
        (formatting.megabytes(605_100_000), "605"),
        (formatting.millions(0), "–"),
        (formatting.millions(6_850_000), "6.8"),
        (formatting.ratio(4.66), "4.7×"),
        (formatting.ratio(18.2), "18×"),
    ],
)
def test_numbers_are_formatted_for_reading(text: str, expected: str) -> None:
    assert text == expected
