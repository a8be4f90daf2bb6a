from __future__ import annotations

import pytest

pytest.importorskip("emoji")
pytest.importorskip("resvg_py")

from clip_rd_edge.data import emoji
from clip_rd_edge.data.tasks import load_task


def test_test_images_and_unseen_concepts_are_not_trained_on() -> None:
    trained = set(emoji.training_pairs().images)
    for split in ("unseen style", "unseen concepts"):
        assert not trained & set(emoji.zero_shot_task(split).images)
    unseen = {concept.code for concept in emoji.concepts() if concept.split == "unseen concepts"}
    assert not unseen & {path.stem for path in trained}
    names = {c.name for c in emoji.concepts() if c.split == "unseen concepts"}
    captions = {caption for group in emoji.training_pairs().texts for caption in group}
    assert not names & captions


def test_unseen_style_is_trained_on_in_the_other_style() -> None:
    trained = {(path.parent.name, path.stem) for path in emoji.training_pairs().images}
    for path in emoji.zero_shot_task("unseen style").images:
        assert path.parent.name == "openmoji"
        assert ("twemoji", path.stem) in trained


def test_skin_tones_are_excluded_and_names_are_unique() -> None:
    names = [concept.name for concept in emoji.concepts()]
    assert len(set(names)) == len(names)
    assert not any("skin tone" in name for name in names)


def test_built_in_tasks_are_loaded_by_name() -> None:
    task = load_task("emoji:unseen-concepts")
    assert len(task.images) == 380
    assert load_task("emoji:unseen-style:retrieval").name == "emoji, unseen style, retrieval"
