"""Which models can be the student of a run."""

from __future__ import annotations

import pytest
import torch

from clip_rd_edge.distillation.student import require_no_logit_bias, require_separate_text_tower
from clip_rd_edge.errors import UsageError
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.student import build_student, student_config


@pytest.fixture
def student() -> ClipModel:
    config = student_config("test_resnet", embedding_size=8, image_size=32, text="64x1", context_length=8)
    return build_student(config, name="test_resnet")


def test_a_student_with_a_logit_bias_is_refused(student: ClipModel) -> None:
    require_no_logit_bias(student)
    student.model.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))
    with pytest.raises(UsageError, match="test_resnet has a logit bias, as SigLIP's models do"):
        require_no_logit_bias(student)


def test_a_text_tower_that_is_no_module_of_its_own_cannot_be_frozen(student: ClipModel) -> None:
    require_separate_text_tower(student)
    del student.model.text
    with pytest.raises(UsageError, match="The text tower of test_resnet cannot be frozen") as error:
        require_separate_text_tower(student)
    assert error.value.hint == "omit --freeze-text"
