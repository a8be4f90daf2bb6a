"""Gives msgspec structs and named tuples the constructor that their fields imply, so the reference shows all fields."""

from __future__ import annotations

from typing import Any

from griffe import Attribute, Class, Extension, Function, Parameter, ParameterKind, Parameters

BASES = {"msgspec.Struct", "typing.NamedTuple"}


def default_of(field: Attribute) -> Any:
    """The default as written, but `...` for what `msgspec.field` computes."""
    return "..." if "field(" in str(field.value) else field.value


class StructFields(Extension):
    """What griffe does itself for dataclasses."""

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
