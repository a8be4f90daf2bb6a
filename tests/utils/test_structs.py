from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from clip_rd_edge.errors import ConfigError, InputError
from clip_rd_edge.utils.structs import read_yaml, to_yaml


class Oven(msgspec.Struct, forbid_unknown_fields=True):
    temperature: int
    grill: bool = False


class Kitchen(msgspec.Struct, forbid_unknown_fields=True):
    ovens: tuple[Oven, ...]
    spare: Oven | None = None


@pytest.mark.parametrize("text", ["ovens: [{temperature: 1, gril: true}]", "{ovens: [], spare: {gril: true}}"])
def test_a_misspelt_nested_key_gets_suggestions(tmp_path: Path, text: str) -> None:
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
def test_invalid_content_is_reported_with_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "oven.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        read_yaml(path, Oven)
    assert str(path) in str(error.value)


def test_an_unknown_key_lists_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "kitchen.yaml").write_text("ovens: [{temperature: 1, door: open}]")
    with pytest.raises(ConfigError, match=r"unknown field `door` - at `\$\.ovens\[0\]`\.$") as raised:
        read_yaml(tmp_path / "kitchen.yaml", Kitchen)
    assert raised.value.hint == "the keys there are temperature, grill"


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


@pytest.mark.parametrize("text", ["e-3", "1e", "1e-3x", "1 e3", "v1e3", "1.2.3", "2026-11-26"])
def test_other_texts_in_yaml_are_no_numbers(tmp_path: Path, text: str) -> None:
    (tmp_path / "rate.yaml").write_text(f"rate: {text}\nname: x")
    if text == "2026-11-26":  # a date in YAML, which no setting is
        with pytest.raises(ConfigError, match="Expected"):
            read_yaml(tmp_path / "rate.yaml", Rate)
    else:
        assert read_yaml(tmp_path / "rate.yaml", Rate).rate == text


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        read_yaml(tmp_path / "nowhere.yaml", Oven)


@pytest.mark.parametrize(
    ("content", "message"),
    [("[" * 5_000, "nested too deep"), ("{a: " * 5_000, "nested too deep"), ("a: 2001-99-99", "invalid value")],
)
def test_yaml_that_pyyaml_cannot_hold_is_one_sentence(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "kitchen.yaml").write_text(content)
    with pytest.raises(ConfigError, match=rf"kitchen\.yaml .*{message}"):
        read_yaml(tmp_path / "kitchen.yaml", Kitchen)
