from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("emoji")
pytest.importorskip("resvg_py")

from clip_rd_edge.data import emoji
from clip_rd_edge.data.tasks import load_task


def test_the_split_is_by_concept_and_of_the_stated_sizes() -> None:
    counts = Counter(concept.split for concept in emoji.concepts())
    assert counts["unseen concepts"] == 190
    assert counts["unseen style"] == 380
    assert sum(counts.values()) > 1850


def test_no_test_picture_and_no_unseen_concept_is_trained_on() -> None:
    trained = set(emoji.training_pairs().images)
    for split in ("unseen style", "unseen concepts"):
        assert not trained & set(emoji.zero_shot_task(split).images)
    unseen = {concept.code for concept in emoji.concepts() if concept.split == "unseen concepts"}
    assert not unseen & {path.stem for path in trained}
    names = {c.name for c in emoji.concepts() if c.split == "unseen concepts"}
    captions = {caption for group in emoji.training_pairs().texts for caption in group}
    assert not names & captions


def test_unseen_style_is_seen_in_the_other_style() -> None:
    trained = {(path.parent.name, path.stem) for path in emoji.training_pairs().images}
    for path in emoji.zero_shot_task("unseen style").images:
        assert path.parent.name == "openmoji"
        assert ("twemoji", path.stem) in trained


def test_skin_tones_are_left_out_and_names_are_told_apart() -> None:
    names = [concept.name for concept in emoji.concepts()]
    assert len(set(names)) == len(names)
    assert not any("skin tone" in name for name in names)


def test_pictures_are_drawn_on_white() -> None:
    for path in emoji.zero_shot_task("unseen concepts").images[:8]:
        with Image.open(path) as picture:
            assert (picture.size, picture.mode) == ((72, 72), "RGB")
            assert picture.getcolors(maxcolors=5184) is not None


def test_an_interrupted_drawing_is_not_taken_for_a_finished_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIP_RD_EDGE_CACHE", str(tmp_path))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(emoji, "_draw_concept", stop)
    with pytest.raises(KeyboardInterrupt):
        emoji.draw()
    assert list(tmp_path.iterdir()) == []


def test_tasks_by_name() -> None:
    task = load_task("emoji:unseen-concepts")
    assert len(task.images) == 380
    assert load_task("emoji:unseen-style:retrieval").name == "emoji, unseen style, retrieval"
