"""Interpolate between the weights of a model before and after fine-tuning (WiSE-FT, Wortsman et al. 2022)."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor

from clip_rd_edge.errors import ConfigError
from clip_rd_edge.models.clip import ClipModel


def interpolate_clip(before: ClipModel, after: ClipModel, *, share: float) -> ClipModel:
    """Return a model with the weights (1 − share) · before + share · after.

    A fine-tuned model has forgotten some of what its start knew. Between the two there are weights that are nearly as
    good on the new data and nearly as good on the old, as long as the fine-tuning did not go far.

    Args:
        share: of the fine-tuned weights, from 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"The share of the fine-tuned weights is {share}; expected a number from 0 to 1.")
    old, new = before.model.state_dict(), after.model.state_dict()
    if {name: tensor.shape for name, tensor in old.items()} != {name: tensor.shape for name, tensor in new.items()}:
        raise ConfigError(f"{before.name} and {after.name} have different architectures; expected the same.")
    model = copy.deepcopy(after.model)
    model.load_state_dict({name: _interpolate(old[name], tensor, share) for name, tensor in new.items()})
    return dataclasses.replace(after, model=model)


def _interpolate(old: Tensor, new: Tensor, share: float) -> Tensor:
    """Interpolate weights; counters, such as the number of batches that a norm has seen, are those of `new`."""
    return torch.lerp(old, new, share) if new.is_floating_point() else new
