from __future__ import annotations

import json
import math
from typing import Annotated, Any

import msgspec
import numpy as np
import pytest
from msgspec import Meta

from clip_rd_edge.errors import ConfigError
from clip_rd_edge.utils.structs import CheckedStruct, NonNegativeInt, PositiveFloat, Share, convert, is_list_of_texts


class Settings(CheckedStruct, frozen=True, kw_only=True):
    rate: PositiveFloat = 1.0
    steps: NonNegativeInt = 1
    share: Share | None = None
    offset: float = 0.0
    pair: tuple[Annotated[int, Meta(ge=1)], Annotated[int, Meta(ge=1)]] = (1, 1)
    many: tuple[float, ...] = ()
    named: dict[str, Share] = msgspec.field(default_factory=dict)
    text: str | None = None
    flag: bool = False


INVALID = [
    ("rate", math.nan), ("rate", math.inf), ("rate", 0.0), ("rate", -1.0), ("rate", 10**400),
    ("steps", -5), ("steps", 2**63), ("steps", 1.5), ("steps", math.nan),
    ("share", math.nan), ("share", 1.01), ("share", -0.01), ("share", "0.5"),
    ("offset", math.nan), ("offset", -math.inf),
    ("pair", (1, 0)), ("pair", (1,)), ("pair", 3),
    ("many", (0.5, math.nan)), ("many", (math.inf,)),
    ("named", {"a": math.nan}), ("named", {"a": 2.0}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), INVALID)
def test_a_number_out_of_range_is_refused_in_python_and_from_a_file(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        Settings(**{name: value})
    with pytest.raises(ConfigError, match=rf"settings\.yaml is invalid: .*{name}"):
        convert({name: value}, Settings, source="settings.yaml")


@pytest.mark.parametrize(
    ("name", "value"),
    [("rate", 1), ("steps", 0), ("share", None), ("share", 1.0), ("offset", -3.5), ("pair", (1, 7)),
     ("many", ()), ("many", (1.0, 2.0)), ("named", {"a": 0.5}), ("text", "nan"), ("flag", True)],
)  # fmt: skip
def test_a_number_in_range_is_kept(name: str, value: Any) -> None:
    assert getattr(Settings(**{name: value}), name) == value
    assert getattr(convert({name: value}, Settings, source="settings.yaml"), name) == value


def test_replacing_a_field_checks_it_again() -> None:
    with pytest.raises(ConfigError, match="rate is nan; expected a finite number greater than 0"):
        msgspec.structs.replace(Settings(), rate=math.nan)


TEXTS = ["a dog", "it's a dog's tail, [sic]", 'a "dog"', "\\", "two\nlines", "ein Hündchen \U0001f436", ""]


@pytest.mark.parametrize("count", range(len(TEXTS) + 1))
def test_a_list_of_texts_is_known_however_it_was_written(count: int) -> None:
    texts = TEXTS[:count]
    for written in (json.dumps(texts), json.dumps(texts, indent=2), repr(texts), str(np.array(texts, object))):
        assert is_list_of_texts(written), written


@pytest.mark.parametrize(
    "text",
    ["a dog", "[sic] 'a dog'", "['tis a dog]", "['a dog'] and ['a cat']", "[1, 2]", '["a dog"', "{'a': 'b'}"],
)
def test_a_text_with_brackets_or_quotes_is_no_list(text: str) -> None:
    assert not is_list_of_texts(text)
