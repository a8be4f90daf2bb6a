"""Shows the fields of structs: in the constructor of a struct, and as the arguments of a function of settings."""

from __future__ import annotations

import functools
import importlib
import inspect
import operator
import re
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from griffe import Attribute, Class, Extension, Function, Parameter, ParameterKind, Parameters

BASES = {"msgspec.Struct", "typing.NamedTuple"}


def default_of(field: Attribute) -> Any:
    """The default as written, but `...` for what `msgspec.field` computes."""
    return "..." if "field(" in str(field.value) else field.value


KINDS = {
    inspect.Parameter.POSITIONAL_OR_KEYWORD: ParameterKind.positional_or_keyword,
    inspect.Parameter.KEYWORD_ONLY: ParameterKind.keyword_only,
}


def annotation_of(parameter: inspect.Parameter) -> str:
    """The type as a reader writes it, without what describes the option."""
    names = {"str | os.PathLike[str]": "AnyPath", "typing.": "", "collections.abc.": "", "NoneType": "None"}
    text = inspect.formatannotation(_plain(parameter.annotation))
    for long, short in names.items():
        text = text.replace(long, short)
    return re.sub(r"\b(?:clip_rd_edge|threading|pathlib)(?:\.\w+)*\.(\w+)", r"\1", text)


def _plain(annotation: Any) -> Any:
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _plain(members[0])
    if origin in (Union, UnionType):
        plain = [_plain(member) for member in members]
        return functools.reduce(operator.or_, plain)
    return annotation


def shown(default: Any) -> str:
    """A default as it is written."""
    return "SILENT" if type(default).__name__ == "Reporter" else "..." if callable(default) else repr(default)


class StructFields(Extension):
    """What griffe does itself for dataclasses."""

    def on_function(self, *, func: Function, **_: Any) -> None:
        """Give a function of a struct of settings the struct's fields; the command's options say what they mean."""
        if not any("keywords_of" in str(decorator.value) for decorator in func.decorators):
            return
        call = getattr(importlib.import_module(func.module.path), func.name)
        func.parameters = Parameters(
            *(
                Parameter(
                    parameter.name,
                    annotation=annotation_of(parameter),
                    kind=KINDS[parameter.kind],
                    default=None if parameter.default is parameter.empty else shown(parameter.default),
                )
                for parameter in inspect.signature(call).parameters.values()
            )
        )

    def on_class(self, *, cls: Class, **_: Any) -> None:
        """Add `__init__` where there is none."""
        bases = {getattr(base, "canonical_path", str(base)) for base in cls.bases}
        if not bases & BASES or "__init__" in cls.members:
            return
        by_name = "msgspec.Struct" in bases
        kind = ParameterKind.keyword_only if by_name else ParameterKind.positional_or_keyword
        fields = [
            Parameter(name, annotation=field.annotation, kind=kind, default=default_of(field))
            for name, field in cls.attributes.items()
            if field.annotation is not None and "property" not in field.labels
        ]
        receiver = Parameter("self", annotation=None, kind=ParameterKind.positional_or_keyword, default=None)
        init = Function("__init__", parameters=Parameters(receiver, *fields), parent=cls, lineno=0, endlineno=0)
        cls.set_member("__init__", init)
