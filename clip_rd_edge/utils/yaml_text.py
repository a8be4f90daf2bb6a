"""YAML as text: read safely, whatever is in it, and written so that it is read back as it was."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_rd_edge.errors import ConfigError
from clip_rd_edge.utils.printable import is_unicode

if TYPE_CHECKING:
    import yaml

MAX_YAML_BYTES = 1_000_000  # a file is read at some 100 kB/s; a suite of a hundred rows has 10 kB
MAX_VALUES = 1_000_000  # in a file, each as often as aliases repeat it: nine lines can stand for a billion


def parse_yaml(content: bytes | str, *, source: Path) -> Any:
    """Return the content of a YAML file as plain Python objects."""
    import yaml

    if len(content) > MAX_YAML_BYTES:
        raise ConfigError(
            f"{source} has {len(content):,} bytes; the limit for YAML is {MAX_YAML_BYTES:,}.",
            hint="a list of labels may also be a text or JSON file",
        )
    loader: Any = None
    try:
        loader = yaml_classes()[0](content)
        node = loader.get_single_node()
        if node is None:
            return None
        _require_few_values(node, source)
        return _construct(loader, node, source)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{source} is not valid YAML: {' '.join(str(error).split())}.",
            hint="compare it with a valid file: clip-rd-edge recipe show clip-rd, or clip-rd-edge benchmark --init",
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{source} is not valid YAML for this: its values are nested too deep.") from error
    finally:
        if loader is not None:
            loader.dispose()


def _construct(loader: Any, node: yaml.Node, source: Path) -> Any:
    import yaml

    try:
        return loader.construct_document(node)
    except (yaml.YAMLError, RecursionError):
        raise
    except ValueError as error:  # of a date or a number that Python cannot represent
        raise ConfigError(f"{source} has an invalid value: {str(error).rstrip('.')}.") from error
    except Exception as error:  # PyYAML ends with any error for `!!int ''`, `!!bool x` or `!!timestamp x`
        raise ConfigError(
            f"{source} has a value that is not of its tag ({type(error).__name__} in PyYAML).",
            hint="remove what begins with ! or !!",
        ) from error


def _require_few_values(root: yaml.Node, source: Path) -> None:
    """Refuse aliases that multiply values, or that lead to the value that they are in; refuse halves of characters."""
    import yaml

    counts: dict[int, int] = {}  # values in a node, by its identity; 0 while its children are counted

    def count(node: Any) -> int:
        known = counts.get(id(node))
        if known is not None:
            if known == 0:
                raise ConfigError(f"{source} has an alias for the value that it is in.", hint="write the value out")
            return known
        counts[id(node)] = 0
        if isinstance(node, yaml.ScalarNode):
            if not is_unicode(node.value):
                raise ConfigError(f"{source} has the value {node.value!r}, which is no Unicode.")
            children: Any = ()
        elif isinstance(node, yaml.MappingNode):
            children = (part for pair in node.value for part in pair)
        else:
            children = node.value
        counts[id(node)] = total = 1 + sum(map(count, children))
        return total

    if (total := count(root)) > MAX_VALUES:
        raise ConfigError(
            f"{source} stands for {total:,} values; the limit is {MAX_VALUES:,}.", hint="use fewer aliases (*name)"
        )


# As in YAML 1.2 and JSON. PyYAML follows YAML 1.1, where 1e-3 is a text: it has neither a point nor a signed exponent.
_FLOAT = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)$")


@cache
def yaml_classes() -> tuple[type[yaml.SafeLoader], type[yaml.SafeDumper]]:
    """Return PyYAML's safe loader and dumper with numbers such as 1e-3."""
    import yaml  # takes 20 ms to import, and running a bundle does not need it

    class Loader(yaml.SafeLoader):
        def construct_yaml_float(self, node: Any) -> float:
            number: float = super().construct_yaml_float(node)
            # 1e4 may stand where an integer is expected; an integer is accepted wherever a float is.
            return int(number) if "e" in node.value.lower() and number.is_integer() else number

    Loader.add_constructor("tag:yaml.org,2002:float", Loader.construct_yaml_float)

    class Dumper(yaml.SafeDumper):
        pass

    for kind in (Loader, Dumper):  # the dumper quotes texts that would be read as numbers
        kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
    return Loader, Dumper
