from __future__ import annotations

import dataclasses

import pytest
import torch

from clip_rd_edge.errors import ConfigError
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.edit import interpolate_clip
from clip_rd_edge.models.students import build_student, student_config


def tiny(seed: int, width: int = 16) -> ClipModel:
    torch.manual_seed(seed)
    config = student_config("test_resnet", embedding_size=width, image_size=32, text="64x1", context_length=8)
    return build_student(config, name=f"tiny {seed}")


def test_weights_and_statistics_are_interpolated_and_counters_taken_from_after() -> None:
    before, after = tiny(0), tiny(1)
    after.model(torch.randn(4, 3, 32, 32), torch.ones(4, 8, dtype=torch.long))  # moves the batch norms' statistics
    old, new = ({k: v.clone() for k, v in clip.model.state_dict().items()} for clip in (before, after))
    between = interpolate_clip(before, after, share=0.75).model.state_dict()
    assert any(name.endswith("running_mean") for name in between)
    for name, tensor in between.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, 0.25 * old[name] + 0.75 * new[name])
        else:
            assert torch.equal(tensor, new[name])
    for name, tensor in after.model.state_dict().items():
        assert torch.equal(tensor, new[name])  # the inputs are left unchanged


def test_both_ends_are_the_models_themselves() -> None:
    before, after = tiny(0), tiny(1)
    for share, end in ((0.0, before), (1.0, after)):
        state = interpolate_clip(before, after, share=share).model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in end.model.state_dict().items())


def test_models_that_differ_and_shares_out_of_range_are_refused() -> None:
    before = tiny(0)
    with pytest.raises(ConfigError, match="tiny 0 and tiny 1 have different architectures"):
        interpolate_clip(before, tiny(1, width=24), share=0.5)
    with pytest.raises(ConfigError, match=r"is 1\.5; expected a number from 0 to 1"):
        interpolate_clip(before, dataclasses.replace(before), share=1.5)
