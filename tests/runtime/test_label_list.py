from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from clip_rd_edge.errors import ConfigError, InputError
from clip_rd_edge.runtime.labels import everyday_labels, label_names, parse_labels, read_labels_file, read_texts

# Name and content of a label file; each holds the labels "a pig" and "a dog, asleep".
FILES = {
    "labels.txt": "# animals\na pig\n\n#\n  a dog, asleep \n",
    "labels": "\ufeffa pig\r\na dog, asleep\r\n",
    "labels.csv": 'label,count\na pig,3\n"a dog, asleep",4\na pig,5\n',
    "semicolon.csv": "id;Class_Name\n7;a pig\n8;a dog, asleep\n",
    "tabs.csv": "id\tlabel\n7\ta pig\n8\ta dog, asleep\n",
    "excel.csv": "\ufeffsep=;\r\nid;label\r\n7;a pig\r\n8;a dog, asleep\r\n",
    "bars.csv": "id|label\n7|a pig\n8|a dog, asleep\n",
    "commas.tsv": 'name,id\na pig,7\n"a dog, asleep",8\n',
    "old mac.csv": "id;label\r7;a pig\r8;a dog, asleep\r",
    "one column.csv": 'a pig\n"a dog, asleep"\n',
    "numbered.csv": 'label,count,class_name\n0,3,a pig\n1,4,"a dog, asleep"\n',
    "labels.tsv": "id\tname\n7\ta pig\n8\ta dog, asleep\n",
    "list.json": '["a pig", "a dog, asleep"]',
    "object.json": '{"version": 1, "labels": ["a pig", "a dog, asleep"]}',
    "id2label.json": '{"id2label": {"10": "a dog, asleep", "2": "a pig"}}',
    "imagenet.json": '{"0": ["n02395406", "a pig"], "1": ["n02084071", "a dog, asleep"]}',
    "coco.json": '{"classes": [{"id": 1, "name": "a pig"}, {"id": 2, "name": "a dog, asleep"}]}',
    "lines.jsonl": '{"id": 7, "Name": "a pig"}\n\n{"id": 8, "Name": "a dog, asleep"}\n',
    "lines.ndjson": '"a pig"\r\n"a dog, asleep"\r\n',
    "yolo.yaml": "path: data\nnames:\n  0: a pig\n  1: a dog, asleep\n",
}


@pytest.mark.parametrize("name", FILES)
def test_a_label_file_is_read_by_what_it_is(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    labels = ["a pig", "a dog, asleep"]
    assert parse_labels([str(tmp_path / name)]) == labels
    assert label_names(tmp_path / name) == label_names(str(tmp_path / name)) == labels
    monkeypatch.chdir(tmp_path)
    assert parse_labels(["a cat", f"./{name}", "a cow"]) == ["a cat", *labels, "a cow"]


def test_numbers_are_labels_where_a_table_has_no_names_or_the_column_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "digits.csv"
    path.write_text("label,image\n0,a.png\n1,b.png\n")
    assert read_labels_file(path) == ["0", "1"]
    path.write_text("digit,name\n0,zero\n1,one\n")
    assert read_texts(str(path), "digit") == ["0", "1"]


@pytest.mark.parametrize(
    "content",
    [
        '[{"name": "1.jpg", "Caption": "a pig"}, {"name": "2.jpg", "Caption": "a dog"}]',
        '{"name": ["1.jpg", "2.jpg"], "Caption": ["a pig", "a dog"]}',
        '{"caption": "of animals", "names": ["a pig", "a dog"]}',
    ],
)
def test_the_key_that_is_asked_for_comes_before_the_usual_ones(tmp_path: Path, content: str) -> None:
    path = tmp_path / "captions.json"
    path.write_text(content)
    assert read_texts(str(path), "Caption") == ["a pig", "a dog"]


# What ImageNet calls otherwise: test data for the next test.
OTHER_NAMES = {
    "cow": "ox", "goat": "ibex", "parrot": "macaw", "hamburger": "cheeseburger", "sandwich": "hotdog",
    "bread": "French loaf", "alarm clock": "digital clock", "wristwatch": "watch", "computer monitor": "monitor",
    "sofa": "studio couch", "chest of drawers": "chiffonier", "bandage": "Band Aid", "gas mask": "gasmask",
    "jeans": "jean", "pajamas": "pajama", "motorcycle": "motor scooter", "airplane": "airliner", "sailboat": "yawl",
}  # fmt: skip


def test_everyday_names_what_a_classifier_for_imagenet_knows() -> None:
    labels = parse_labels(["everyday"])
    assert labels is not None
    assert label_names("everyday") == labels
    assert len(labels) == len(set(labels)) > 200
    info = pytest.importorskip("timm.data").ImageNetInfo()
    classes = "; ".join(info.index_to_description(index) for index in range(info.num_classes()))
    for label in labels:
        name = OTHER_NAMES.get(label, label)
        assert re.search(rf"\b{re.escape(name)}s?\b", classes, re.IGNORECASE), f"{name!r} is no class"


def test_everyday_is_the_list_beside_other_labels_too_unless_a_file_has_this_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    everyday = everyday_labels()
    assert parse_labels(["everyday", "a torch"]) == [*everyday, "a torch"]
    (tmp_path / "mine.txt").write_text("special\neveryday\n")
    assert parse_labels(["mine.txt", "everyday"]) == ["special", "everyday", *everyday]
    (tmp_path / "everyday").write_text("a pig\n")
    assert parse_labels(["everyday"]) == ["a pig"]
    with pytest.raises(InputError, match="'everyday' may be a label or the file of that name"):
        parse_labels(["everyday", "a torch"])


# Words that are no label, what the message says, and the words that its hint leads to.
@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["labelz.txt"], "no such file. Did you mean 'labels.txt'?", "check the path"),
        (["a pig", "labelz.txt"], "no such file. Did you mean 'labels.txt'?", "check the path"),
        (["labels.tx"], "no such file. Did you mean 'labels.txt'?", "check the path"),
        (["./labels"], "looks like the path of a file", "check the path"),
        (["sub/labels.tx"], "Did you mean 'sub/labels.txt'?", "check the path"),
        (["~/no-such-labels"], "looks like the path of a file", "check the path"),
        (["C:\\data\\labels"], "looks like the path of a file", "check the path"),
        (["sub/"], "is a folder", "name a text file with one label per line"),
        (["a pig", "photo.jpg"], "is an image", "name the images before labels"),
        (["a pig", "dog"], "may be a label or the file of that name", "./dog"),
        (["pig,dog,boat"], "looks like a list", 'labels "pig" "dog" "boat"'),
        (["pig, dog"], "looks like a list", 'labels "pig" "dog"'),
        (["pig;dog"], "looks like a list", 'labels "pig" "dog"'),
        (["pig|dog"], "looks like a list", 'labels "pig" "dog"'),
        (["pig\ndog"], "looks like a list", 'labels "pig" "dog"'),
        (['["pig", "a dog"]'], "looks like a list", 'labels "pig" "a dog"'),
        (["a cat", "['pig']"], "looks like a list", 'labels "pig"'),
        (["pig,", "dog,", "boat"], "looks like a list", 'labels "pig"'),
        (["a cat", "pig,dog"], "looks like a list", 'labels "pig" "dog"'),
    ],
)
def test_a_word_that_is_probably_no_label_is_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str, hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in ("labels.txt", "sub/labels.txt", "photo.jpg", "dog"):
        (tmp_path / name).write_text("a pig\n")
    with pytest.raises(InputError) as raised:
        parse_labels(words)
    assert message in str(raised.value)
    assert hint in raised.value.hint


@pytest.mark.parametrize(
    "words",
    [
        ["a pig"],
        ["a dog, asleep", "a dog, awake"],
        ["1,000 metres"],
        ["black/white", "U.S.A.", "node.js", "St. Bernard", "#1", "church/indoor", "?", "a" * 5000],
        ["[unknown]", "{}"],
    ],
)
def test_unusual_labels_are_taken_as_they_are(words: list[str]) -> None:
    assert parse_labels(words) == words


def test_a_list_in_python_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("not for clients\n")
    labels = ["pig,dog", str(tmp_path / "secret.txt"), "no/such.txt", "everyday"]
    assert label_names(labels) == label_names(tuple(labels)) == label_names(np.array(labels)) == labels
    assert label_names("a pig") == ["a pig"]
    assert label_names(()) == []
    assert label_names(None) is parse_labels([]) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "# nothing\n", "has no labels"),
        ("latin.txt", "caf\xe9", "is not UTF-8 text"),
        ("line.txt", "pig, dog, boat\n", "looks like a list"),
        ("lists.txt", "['a pig', 'two pigs']\na cat\n", "has a label that is a list: .*a pig"),
        ("lists.csv", 'file,label\n1.jpg,"[""a pig""]"\n', "has a label that is a list: .*a pig"),
        ("table.csv", "labl,count\npig,3\n", "no column headed 'label'.* Did you mean 'labl'"),
        ("tabs.csv", "id\tlabl\n7\tpig\n", "no column headed 'label'"),
        ("commas.csv", "label\npig\ndog, asleep\n", "line 3, has more fields than its first line"),
        ("of R.csv", '"label"\n"1","pig"\n', "line 2, has more fields than its first line"),
        ("unnamed.csv", "bear\nbear, brown\n", "line 2, has more fields than its first line"),
        ("excel.csv", 'sep=;\nlabel\n"a pig', "line 3: unexpected end of data"),
        ("excel.csv", "sep=;\nlabel;id\npig;1;dog\n", "line 3, has more fields than its first line"),
        ("sheet.xlsx", "PK\x03\x04\x14\0\xff", "The label file .*sheet.xlsx is a zip archive or an Excel workbook"),
        ("labels.txt.gz", "\x1f\x8b\x08", "is compressed by gzip"),
        ("empty.csv", "", "has no labels"),
        ("broken.json", '["a pig",', "is not valid JSON"),
        ("number.json", "[1, 2]", "entry 1 is 1; expected a name"),
        ("object.json", '{"a": 1}', "has no list of labels"),
        ("captions.json", '[["a pig", "two pigs", "pigs"]]', "entry 1 is .'a pig', .*; expected a name"),
        ("synonyms.json", '{"0": ["tench", "Tinca tinca"]}', "entry 1 is .'tench', .*; expected a name"),
        ("broken.jsonl", '"a pig"\n"a dog\n', r"broken.jsonl, line 2, is not valid JSON"),
        ("broken.yaml", "names: [", "is not valid YAML"),
        ("missing.txt", None, "Cannot read .*missing.txt: No such file"),
        ("folder", None, "is a folder"),
    ],
)
def test_an_unreadable_label_file_is_refused(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="latin-1")
    (tmp_path / "folder").mkdir()
    with pytest.raises((InputError, ConfigError), match=message):
        read_labels_file(tmp_path / name)


def test_white_space_around_a_label_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text(" a dog \n")
    assert parse_labels([" a cat", "a cat ", str(tmp_path / "labels.txt")]) == ["a cat", "a cat", "a dog"]
    assert parse_labels(["a cat", "  "]) == ["a cat", ""]  # which the classifier refuses


def test_utf_16_without_a_mark_is_not_taken_for_labels(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_bytes("a cat\na dog\n".encode("utf-16-le"))
    with pytest.raises(InputError, match=r"is not UTF-8 text: .* UTF-16"):
        read_labels_file(tmp_path / "labels.txt")


def test_a_field_of_several_lines_is_refused_with_a_hint_that_fits(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text('label\n"a cat\non a mat"\n')
    with pytest.raises(InputError, match=r"labels\.csv, line 2: a quoted field holds several lines") as refusal:
        read_labels_file(tmp_path / "labels.csv")
    assert refusal.value.hint.startswith("write each text on one line")


def test_other_columns_and_captions_may_have_several_lines(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    rows = (
        'filepath,title,"label\n"',
        'a.jpg,"two\nlines",dog',
        'b.jpg,"a cat, asleep\n\non a mat, red,\nand one, awake\n",cat',
    )
    path.write_text("\r\n".join(rows))
    assert read_labels_file(path) == ["dog", "cat"]
    texts = ["two\nlines", "a cat, asleep\n\non a mat, red,\nand one, awake"]
    assert read_texts(str(path), "title") == texts
    path.write_text('title\n"two\nlines"\none\n')
    assert read_texts(str(path), "title") == ["two\nlines", "one"]


@pytest.mark.parametrize(
    "rows",
    ['dog,"a toy\ncat,a pet"\n', 'dog,"a toy\nhen,grey\ncat,a pet\npig,5"\n', '"dog,a toy\ncat",a pet\n'],
)
def test_rows_that_a_stray_quote_joined_are_refused(tmp_path: Path, rows: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(f"label,title\nbird,free\n{rows}")
    for read in (read_labels_file, lambda path: read_texts(str(path), "title")):
        with pytest.raises(InputError, match=r"table\.csv, line 3: a quoted field holds several lines"):
            read(path)


def test_only_line_ends_end_a_row_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes("id,label\r\n1,a cat\u2028on a mat\r\n2,a dog\x85by the sea\n3,red\x0band blue\n".encode())
    assert read_labels_file(path) == ["a cat\u2028on a mat", "a dog\x85by the sea", "red\x0band blue"]


@pytest.mark.parametrize("read", [read_labels_file, lambda path: read_texts(str(path), "title")])
def test_a_file_that_is_too_large_says_what_to_do(tmp_path: Path, read: Callable[[Path], object]) -> None:
    path = tmp_path / "labels.txt"
    path.touch()
    os.truncate(path, 1 << 29)
    with pytest.raises(InputError, match="is larger than the") as caught:
        read(path)
    assert caught.value.hint == "leave out some of the labels or captions, or shorten them"


def test_a_label_may_begin_with_a_tilde() -> None:
    assert parse_labels(["~100 people", "a cat"]) == ["~100 people", "a cat"]
    assert parse_labels(["~100 people"]) == ["~100 people"]
