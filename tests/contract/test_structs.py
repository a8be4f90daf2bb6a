from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from clip_rd_edge.contract.structs import read_yaml
from clip_rd_edge.errors import ConfigError, InputError


class Oven(msgspec.Struct, forbid_unknown_fields=True):
    temperature: int
    grill: bool = False


class Kitchen(msgspec.Struct, forbid_unknown_fields=True):
    ovens: tuple[Oven, ...]
    spare: Oven | None = None


@pytest.mark.parametrize("text", ["ovens: [{temperature: 1, gril: true}]", "{ovens: [], spare: {gril: true}}"])
def test_a_misspelt_key_further_down_has_near_matches(tmp_path: Path, text: str) -> None:
    (tmp_path / "kitchen.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"unknown field `gril`.* Did you mean 'grill'"):
        read_yaml(tmp_path / "kitchen.yaml", Kitchen)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("temperature: hot", r"Expected `int`, got `str` - at `\$.temperature`"),
        ("temperatur: 200", r"unknown field `temperatur`.* Did you mean 'temperature'"),
        ("grill: true", "missing required field `temperature`"),
        ("temperature: [", "not valid YAML"),
        ("", "missing required field `temperature`"),
    ],
)
def test_what_does_not_fit_is_named_with_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "oven.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        read_yaml(path, Oven)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        read_yaml(tmp_path / "nowhere.yaml", Oven)
