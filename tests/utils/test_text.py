from __future__ import annotations

import csv
import io

import pytest

from clip_rd_edge.utils.text import csv_row, shown_message, shown_source, shown_sources


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("https://a.example/x/{0..9}.tar?sv=1&sig=SECRET%3D", "https://a.example/x/{0..9}.tar"),
        ("https://user:SECRET@a.example/{0..9}.tar", "https://a.example/{0..9}.tar"),
        ("https://user:SE?CR#ET@a.example/0.tar#SECRET", "https://a.example/0.tar"),
        ("pipe:curl -H 'Authorization: Bearer SECRET' https://a.example/b/{0..9}.tar", "{0..9}.tar"),
        ("pipe:curl 'https://user:SECRET@a.example/{0..9}.tar?sig=SECRET' | pv", "{0..9}.tar"),
        ("pipe:zcat /data/{a,b}.tar.gz", "{a,b}.tar.gz"),
        ("pipe:TOKEN=SECRET fetch the-shard", "pipe:…"),
        ("a/{0..3}.tar::s3://b/{0..3}.tar?versionId=1:: pipe:cat c.tar", "a/{0..3}.tar::s3://b/{0..3}.tar::c.tar"),
    ],
)
def test_what_may_be_a_secret_in_an_address_is_not_shown(source: str, shown: str) -> None:
    assert shown_source(source) == shown
    assert shown_source(shown) == shown


@pytest.mark.parametrize("source", ["emoji", "pairs.csv", r"C:\data\x.csv", " a?b/{0..3}.tar", "1::2", "a {}?"])
def test_what_is_no_address_is_shown_as_it_is(source: str) -> None:
    assert shown_source(source) == source


def test_a_message_and_a_record_are_shown_without_secrets() -> None:
    message = "404, message='Not Found', url='https://user:SECRET@h/a.tar?sig=SECRET%3D' (was http://[::1]/?SECRET)"
    assert shown_message(message) == "404, message='Not Found', url='https://h/a.tar' (was http://[::1]/"
    record = {"data": "s3://k:s@b/0.tar", "tasks": ("a.csv", "https://h/0.tar?s"), "steps": 3, "seed": None}
    assert shown_sources(record) == {
        "data": "s3://b/0.tar", "tasks": ("a.csv", "https://h/0.tar"), "steps": 3, "seed": None,
    }  # fmt: skip


@pytest.mark.parametrize("text", ["a\rb", "a\nb", "a\r\nb", "a\r", "\n", 'a "b", c', "a\u2028b", ""])
def test_a_row_of_csv_is_one_row_whatever_is_in_its_texts(text: str) -> None:
    rows = f"{csv_row(text, 7)}\n{csv_row('b', text)}\n"
    assert list(csv.reader(io.StringIO(rows, newline=""))) == [[text, "7"], ["b", text]]
