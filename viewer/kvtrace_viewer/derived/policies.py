"""The installed policies in a few words, from their own dataclasses."""

from __future__ import annotations

from dataclasses import Field, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class PolicyHelp:
    """A policy for a newcomer.

    Attributes
    ----------
    name
        As the spec names it.
    idea
        One line.
    parameters
        (`name=default`, what it means) of those that are its own, or whose default is.
    """

    name: str
    idea: str
    parameters: tuple[tuple[str, str], ...]


def policy_help() -> list[PolicyHelp]:
    """Every installed policy, the simplest first."""
    # Imported here because it pulls in numba, which takes a second the first time.
    from kvtrace_viewer.replay import Policy
    from kvtrace_viewer.replay.plugins import known_policies

    usual = {field.name: field.default for field in fields(Policy)}
    return [
        PolicyHelp(
            name,
            (policy.__doc__ or "").partition("\n")[0],
            tuple(
                _parameter(field)
                for field in fields(policy)
                if field.name not in usual or field.default != usual[field.name]
            ),
        )
        for name, policy in known_policies().items()
    ]


def _parameter(field: Field[Any]) -> tuple[str, str]:
    from kvtrace_viewer.replay.spec import shown

    unit = field.metadata.get("unit") or ""
    words = field.metadata.get("help") or ""
    return f"{field.name}={shown(field.default)}", f"{words} ({unit})" if unit else words
