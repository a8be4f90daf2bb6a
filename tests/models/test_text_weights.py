"""What a student's text tower starts from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import Watch, tiny_clip

from clip_rd_edge.errors import ConfigError, InputError
from clip_rd_edge.models import text_weights
from clip_rd_edge.models.clip import ClipModel, TextTower
from clip_rd_edge.models.text_weights import init_text_tower, init_token_embeddings


def clip(text: str, *, length: int = 8, width: int = 32, seed: int = 0) -> ClipModel:
    name = "student" if seed else "teacher"
    return tiny_clip(seed=seed, name=name, text=text, embedding_size=width, context_length=length)


def test_a_text_tower_is_initialised_from_the_teachers_layers() -> None:
    teacher, student = clip("64x4", length=12, width=48), clip("64x2", seed=1)
    message = init_text_tower(student, "teacher", teacher)
    student_state, teacher_state = student.model.state_dict(), teacher.model.state_dict()
    assert "layers 1, 4 of the 4 layers of teacher" in message
    for new, old in ((0, 0), (1, 3)):
        name = "text.transformer.resblocks.{}.attn.in_proj_weight"
        assert torch.equal(student_state[name.format(new)], teacher_state[name.format(old)])
    assert torch.equal(student_state["text.positional_embedding"], teacher_state["text.positional_embedding"][:8])
    assert student_state["text.text_projection"].shape == (64, 32)  # the teacher's is wider, so this stays random


def test_text_weights_that_do_not_match_are_refused(tmp_path: Path) -> None:
    student = clip("64x2")
    with pytest.raises(ConfigError) as error:
        init_text_tower(student, "teacher", clip("128x2"))
    assert "text 128xLAYERS" in error.value.hint
    with pytest.raises(ConfigError) as error:
        init_text_tower(student, "teacher", clip("64x2", length=6))
    assert error.value.hint == "context_length 6 gives the student as many positions"
    with pytest.raises(ConfigError):
        init_text_tower(student, "teacher", clip("64x1"))
    with pytest.raises(InputError):
        init_text_tower(student, "teacher", None)
    with pytest.raises(InputError):
        init_text_tower(student, "nothing.pt", None)


def token_embeddings(model: ClipModel) -> torch.Tensor:
    return model.model.get_parameter("text.token_embedding.weight")


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """Only some 500 of the 49,408 tokens have a text, so that the tests are fast."""
    texts = text_weights._token_texts(clip("64x1").tokenizer)
    tokens = {number: text for number, text in texts.items() if number % 97 == 3}
    monkeypatch.setattr(text_weights, "_token_texts", lambda _: tokens)
    return tokens


@torch.no_grad()
def test_tokens_are_as_similar_as_the_teacher_finds_their_texts(few_tokens: dict[int, str]) -> None:
    teacher, student = clip("64x2", width=48), clip("64x1", seed=1)
    before, rows, watch = token_embeddings(student).clone(), list(few_tokens), Watch()
    message = init_token_embeddings(student, [teacher], watch)
    after = token_embeddings(student)
    assert f"{len(few_tokens):,} tokens" in message
    others = [row for row in range(len(after)) if row not in few_tokens]
    assert torch.equal(after[others], before[others])
    assert torch.equal(after[rows, 48:], before[rows, 48:])  # of 64 columns, the teacher has 48
    own = after[rows, :48]
    torch.testing.assert_close(own.square().mean().sqrt(), before.std(), rtol=1e-3, atol=0)
    text = TextTower(teacher.model.eval())(teacher.tokenizer(list(few_tokens.values())))
    text = text - text.mean(0)
    own = own * (text.norm() / own.norm())
    torch.testing.assert_close(own @ own.T, text @ text.T, rtol=1e-3, atol=1e-4)
