from __future__ import annotations

from clip_rd_edge.contract.task import RetrievalTask, with_distinct_names


def names(*tasks: tuple[str, str]) -> list[str]:
    made = [RetrievalTask(name=name, images=(), captions=(), caption_images=()) for name, _ in tasks]
    return [task.name for task in with_distinct_names(made, [source for _, source in tasks])]


def test_tasks_of_one_file_name_are_named_by_the_parts_of_their_paths_that_differ() -> None:
    assert names(("val", "/data/a/val.csv"), ("val", "/data/b/val.csv"), ("test", "/data/a/test.csv")) == [
        "a/val.csv",
        "b/val.csv",
        "test",
    ]
    assert names(("val", "val.csv"), ("val", "val.tsv")) == ["val.csv", "val.tsv"]
    assert names(("val", "/x/val.csv"), ("val", "y/val.csv")) == ["/x/val.csv", "y/val.csv"]


def test_distinct_names_stay() -> None:
    assert names(("a", "x/a.csv"), ("b", "x/b.csv")) == ["a", "b"]
    assert names(("emoji:unseen-style", "emoji:unseen-style")) == ["emoji:unseen-style"]
