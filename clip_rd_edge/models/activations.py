"""timm's image trunks with another activation, by name: `mobilevit_s_relu` is `mobilevit_s` with ReLU.

INT8 computes ReLU within the layer before it. SiLU takes two more passes over every activation, and rounds it twice.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from clip_rd_edge.errors import ConfigError, first_line

ACTIVATIONS = ("relu", "relu6", "hard_swish")  # timm's names
_NAME = re.compile(rf"([\w.]+)_({'|'.join(ACTIVATIONS)})")


def register_activation(name: object) -> None:
    """Register the trunk that a name with an activation stands for, which timm then builds like its own.

    Names without an activation are left alone. Weights that timm publishes for the trunk fit, too.
    """
    import timm
    from timm.layers import get_act_layer

    named = _NAME.fullmatch(str(name or ""))
    if named is None or timm.is_model(name) or not timm.is_model(named[1]):
        return
    trunk, activation = named.groups()

    def create(pretrained: bool = False, **arguments: Any) -> nn.Module:
        try:
            module: nn.Module = timm.create_model(
                trunk, pretrained=pretrained, act_layer=get_act_layer(activation), **arguments
            )
        except TypeError as error:  # of constructors without this argument
            raise ConfigError(f"timm's {trunk} takes no other activation: {first_line(error)}.") from error
        return module

    create.__name__ = named[0]
    timm.models.register_model(create)
