from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import pytest
from msgspec import Meta

from clip_rd_edge.errors import ConfigError, InputError
from clip_rd_edge.utils.structs import (
    CheckedStruct,
    NonNegativeInt,
    PositiveFloat,
    Share,
    UnknownFieldError,
    convert,
    decode_request,
    is_list_of_texts,
    read_yaml,
    to_yaml,
)


class Oven(msgspec.Struct, forbid_unknown_fields=True):
    temperature: int
    grill: bool = False


class Kitchen(msgspec.Struct, forbid_unknown_fields=True):
    ovens: tuple[Oven, ...]
    spare: Oven | None = None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ovens: [{temperature: 1, gril: true}]", r"unknown field `gril` .*\. Did you mean 'grill'\?$"),
        ("ovens: [{temperature: 1, door: open}]", r"unknown field `door` - at `\$\.ovens\[0\]`\.$"),
        ("ovens: [{temperature: hot}]", r"Expected `int`, got `str` - at `\$\.ovens\[0\]\.temperature`"),
        ("", "missing required field `ovens`"),
        ("ovens: [", "not valid YAML"),
        ("[" * 5_000, "not valid YAML"),
        ("{a: " * 5_000, "not valid YAML"),
        ("a: 2001-99-99", "not valid YAML"),
        ("a: !!int ''", "not valid YAML"),
        ('a: "\\ud800"', "not valid YAML"),
        ("a: &a [*a]", "not valid YAML"),
        ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 20}]\n" for i in range(1, 9)), "not valid YAML"),
    ],
)
def test_invalid_content_is_one_sentence_with_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "kitchen.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        read_yaml(path, Kitchen)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 100_000, b'{"temperature": "hot"}'])
def test_a_request_that_is_invalid_is_told_from_one_with_an_unknown_field(body: bytes) -> None:
    with pytest.raises(InputError) as raised:
        decode_request(body, Oven)
    assert not isinstance(raised.value, UnknownFieldError)
    with pytest.raises(UnknownFieldError):
        decode_request(b'{"temperature": 1, "gril": true}', Oven)


class Rate(msgspec.Struct, forbid_unknown_fields=True):
    rate: float | str | None
    name: str = ""
    steps: int = 0


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1e3", "+1.5e2", ".5", ".5e-3", "-1e+2", "1.", "0.1", "7", "1.0e-3"])
def test_numbers_in_yaml_are_those_of_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "rate.yaml").write_text(f"rate: {text}\nname: '{text}'\nsteps: 1e4\n")
    rate = read_yaml(tmp_path / "rate.yaml", Rate)
    assert rate == Rate(rate=float(text), name=text, steps=10_000)
    (tmp_path / "rate.yaml").write_text(to_yaml(rate))
    assert read_yaml(tmp_path / "rate.yaml", Rate) == rate


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
    with pytest.raises(ConfigError, match=name):
        msgspec.structs.replace(Settings(), **{name: value})


TEXTS = ["a dog", "it's a dog's tail, [sic]", 'a "dog"', "\\", "two\nlines", "ein Hündchen \U0001f436", ""]


@pytest.mark.parametrize("count", range(len(TEXTS) + 1))
def test_a_list_of_texts_is_known_however_it_was_written(count: int) -> None:
    texts = TEXTS[:count]
    for written in (json.dumps(texts), json.dumps(texts, indent=2), repr(texts), str(np.array(texts, object))):
        assert is_list_of_texts(written), written
