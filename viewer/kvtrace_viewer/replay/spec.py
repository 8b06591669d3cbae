"""Policies as users write them: `name[:key=value,...]`."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any, get_type_hints

from kvtrace.errors import InputError
from kvtrace_viewer.replay.amounts import Amount
from kvtrace_viewer.replay.policies import POLICIES
from kvtrace_viewer.replay.policy import Policy


def parse_policy(text: str | Policy) -> Policy:
    """Make a policy from `name[:key=value,...]`.

    Raises
    ------
    InputError
        For an unknown name (the nearest are named), an unknown parameter or a value it cannot
        take (what the policy takes is said).
    """
    if isinstance(text, Policy):
        return text
    name, _, rest = text.partition(":")
    kind = POLICIES.get(name)
    if kind is None:
        near = difflib.get_close_matches(name, POLICIES, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "kvtrace replay --help lists them"
        raise InputError(
            f"policy {name!r} is unknown; expected one of {', '.join(POLICIES)}; {hint}"
        )
    values: dict[str, Any] = {}
    hints = get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}
    for item in rest.split(",") if rest else []:
        key, equals, value = item.partition("=")
        if key not in known or not equals or key in values:
            raise InputError(
                f"policy {text!r} has {item!r}; expected each parameter once, as key=value; "
                f"{name} takes {describe(kind)}"
            )
        least = known[key].metadata.get("least")
        values[key] = _value(text, kind, key, value, hints[key], least)
    return kind(**values)


def describe(kind: type[Policy]) -> str:
    """Return what a policy takes, with units and defaults, on one line."""
    return ", ".join(
        f"{f.name} ({f.metadata['unit'] or _kind(f.default)}, default {_shown(f.default)})"
        for f in fields(kind)
    )


def idea(kind: type[Policy]) -> str:
    """Return the first line of a policy's docstring."""
    return (kind.__doc__ or "").strip().partition("\n")[0]


def _value(text: str, kind: type[Policy], key: str, value: str, hint: Any, least: Any) -> Any:
    try:
        found = _convert(value, hint)
    except ValueError:
        found = None
    if found is None or (least is not None and found < least):
        bound = "" if least is None else f" of at least {least:g}"
        raise InputError(
            f"policy {text!r} has {key}={value}; expected {_wanted(hint)}{bound}; "
            f"{kind.name} takes {describe(kind)}"
        )
    return found


def _convert(value: str, hint: Any) -> Any:
    if hint is bool:
        return {"true": True, "false": False}.get(value.lower())
    if hint in (int, float):
        return hint(value)
    return value


def _wanted(hint: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number"}
    return names.get(hint, "text")


def _kind(default: object) -> str:
    return "true or false" if isinstance(default, bool) else type(default).__name__


def _shown(default: object) -> str:
    return str(default).lower() if isinstance(default, bool | Amount) else str(default)
