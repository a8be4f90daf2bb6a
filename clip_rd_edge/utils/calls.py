"""Calls of the Python API, checked before they begin: Python's own errors name neither the argument nor a near name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from clip_rd_edge.errors import require_known_options
from clip_rd_edge.utils.paths import require_paths

P = ParamSpec("P")
R = TypeVar("R")


def checked_call(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function with its calls checked: that options exist, and that each `AnyPath` is a path.

    A function with `**options` checks their names itself.
    """
    parameters = inspect.signature(function).parameters
    command = function.__qualname__.removesuffix(".__init__")
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    paths = {name: kind for name, kind in function.__annotations__.items() if kind in ("AnyPath", "AnyPath | None")}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not open_ended:
            require_known_options(kwargs, parameters, command=command)
        given: dict[str, Any] = {**dict(zip(parameters, args, strict=False)), **kwargs}
        for name, kind in paths.items():
            if name in given and not (given[name] is None and kind != "AnyPath"):
                require_paths(name, given[name])
        return function(*args, **kwargs)

    return call
