"""Models of a suite from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from clip_rd_edge.benchmark.suite import Role, SuiteRow
from clip_rd_edge.errors import ConfigError, near_matches

ROLES = get_args(Role)


def parse_models(models: Sequence[str]) -> tuple[SuiteRow, ...]:
    """Rows from `ROLE=MODEL`, labelled by their roles, and by their models' names where a role has several.

    Raises:
        ConfigError: one has no such form, or no such role.
    """
    parts = [model.partition("=") for model in models]
    roles = [role for role, _, _ in parts]
    rows = []
    for role, _, model in parts:
        if role not in ROLES or not model:
            raise ConfigError(
                f"The model {role + '=' + model if model else role!r} is not ROLE=MODEL with one of the roles "
                f"{', '.join(ROLES)}.{near_matches(role, ROLES)}"
            )
        several = roles.count(role) > 1
        label = f"{role.capitalize()} {model.rstrip('/').rpartition('/')[2]}" if several else role.capitalize()
        rows.append(SuiteRow(label=label, model=model, role=role))  # type: ignore[arg-type]  # it is one of ROLES
    return tuple(rows)
