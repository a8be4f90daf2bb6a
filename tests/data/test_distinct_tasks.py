from __future__ import annotations

from clip_rd_edge.data.tasks import RetrievalTask, ZeroShotTask, with_distinct_names


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


def test_the_questions_of_a_task_are_written_as_in_the_digests_that_are_kept() -> None:
    zero_shot = ZeroShotTask(name="z", images=(), targets=(1, 0), labels=("cat", "dog"), templates=("a {}",))
    assert repr(zero_shot.questions) == "((1, 0), ('cat', 'dog'), ('a {}',))"
    retrieval = RetrievalTask(name="r", images=(), captions=("x", "y", "w"), caption_images=(1, 0, 1))
    assert repr(retrieval.questions) == "(('x', 'y', 'w'), (1, 0, 1))"


def test_the_first_caption_of_an_image_is_found_by_the_image() -> None:
    task = RetrievalTask(name="r", images=(), captions=("x", "y", "w"), caption_images=(3, 0, 3))
    assert task.first_captions() == {3: 0, 0: 1}
