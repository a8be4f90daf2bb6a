from __future__ import annotations

import pytest

from clip_rd_edge.benchmarking import formatting as formats
from clip_rd_edge.benchmarking.metrics import Interval


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (formats.percent(0.71849), "71.8"),
        (formats.percent(None), "–"),
        (formats.share(1, 4), "25\u00a0%"),
        (formats.share(1, 0), "–"),
        (formats.signed_points(-0.0131), "−1.3"),
        (formats.signed_points(0.35), "+35.0"),
        (formats.signed_points(-0.0001), "0.0"),
        (formats.interval(Interval(-0.01, 0.5)), "−1.0 to 50.0"),
        (formats.interval(Interval(-0.0, 0.5)), "0.0 to 50.0"),
        (formats.milliseconds(1.7834), "1.78"),
        (formats.milliseconds(32.46), "32.5"),
        (formats.milliseconds(1234.5), "1,234"),
        (formats.megabytes(7_612_345), "7.6"),
        (formats.megabytes(605_100_000), "605"),
        (formats.millions(0), "–"),
        (formats.millions(6_850_000), "6.8"),
        (formats.times(4.66), "4.7×"),
        (formats.times(18.2), "18×"),
    ],
)
def test_numbers_as_people_read_them(written: str, expected: str) -> None:
    assert written == expected
