"""Policies as users write them: `name[:key=value,...]` or `file.py:Class[:key=value,...]`."""

from __future__ import annotations

import difflib
from dataclasses import Field, fields
from typing import Any, get_type_hints

from kvtrace.errors import InputError
from kvtrace_viewer.replay.amounts import Amount, parse_amount
from kvtrace_viewer.replay.plugins import known_names, load_policy, named_policy
from kvtrace_viewer.replay.policy import Policy
from kvtrace_viewer.replay.when import parse_when
from kvtrace_viewer.user_files import FILE

Values = dict[str, str]
SIGNALS = ("q", "k", "v", "q_prerope", "wo", "score")


def parse_policy(text: str | Policy, *, files: bool = True) -> Policy:
    """Make a policy from `name[:key=value,...]` or `file.py:Class[:key=value,...]`.

    A policy that has another one inside (`base=snapkv`) hands it the keys that it does not
    declare itself: `chunkkv:base=snapkv,window=16,chunk=8`.

    Parameters
    ----------
    text : str or Policy
        A policy is returned as it is.
    files : bool
        Whether a file may be named; its code runs.

    Raises
    ------
    InputError
        For an unknown name (the nearest are named), an unknown parameter or a value it cannot
        take (what the policy takes is said), and a file whose policy cannot be loaded.
    """
    if isinstance(text, Policy):
        return text
    match = FILE.fullmatch(text)
    if match is None:
        name, _, rest = text.partition(":")
        kind = _named(name)
    elif files:
        kind, rest = load_policy(match["file"], match["kind"]), match["rest"] or ""
    else:
        raise InputError(
            f"policy {text!r} is a file; expected a name here; "
            "start with kvtrace view --policy FILE.py:Class, then write its name"
        )
    values: Values = {}
    for item in rest.split(",") if rest else []:
        key, equals, value = item.partition("=")
        if not equals or key in values:
            raise _bad_item(text, item, kind)
        values[key] = value
    return _made(text, kind, values)


def describe(kind: type[Policy]) -> str:
    """Return what a policy takes, with units and defaults, on one line."""
    return ", ".join(f"{f.name} ({_unit(f)}, default {shown(f.default)})" for f in fields(kind))


def idea(kind: type[Policy]) -> str:
    """Return the first line of a policy's docstring."""
    return (kind.__doc__ or "").strip().partition("\n")[0]


def _named(name: str) -> type[Policy]:
    kind = named_policy(name)
    if kind is None:
        names = known_names()
        if {part.strip() for part in name.split(",")} <= set(names):
            asked = " ".join(f"--policy {part.strip()}" for part in name.split(","))
            raise InputError(f"{name!r} are several policies; expected one each time: {asked}")
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "kvtrace replay --list shows them"
        raise InputError(f"policy {name!r} is unknown; expected one of {', '.join(names)}; {hint}")
    return kind


def _made(text: str, kind: type[Policy], values: Values) -> Policy:
    """Make a policy, its base from the keys that it does not declare itself."""
    hints = get_type_hints(kind)
    own = {f.name: f for f in fields(kind)}
    found: dict[str, Any] = {}
    if "base" in own:
        usual = {f.name for f in fields(Policy)}
        rest = {k: v for k, v in values.items() if k in usual or k not in own}
        values = {k: v for k, v in values.items() if k not in rest}
        name = values.pop("base", own["base"].default.name)
        found["base"] = _made(text, _named(name), rest)
    for key, value in values.items():
        if key not in own:
            raise _bad_item(text, f"{key}={value}", kind)
        found[key] = _value(text, kind, own[key], value, hints[key])
    return kind(**found)


def _bad_item(text: str, item: str, kind: type[Policy]) -> InputError:
    return InputError(
        f"policy {text!r} has {item!r}; expected each parameter once, as key=value; "
        f"{kind.name} takes {describe(kind)}"
    )


def _value(text: str, kind: type[Policy], field: Field[Any], value: str, hint: Any) -> Any:
    key, least = field.name, field.metadata.get("least")
    if hint is Amount:
        return parse_amount(value, f"{key} of {kind.name}", f"{key}=32 or {key}=50%")
    try:
        found = _convert(value, hint)
    except ValueError:
        found = None
    if found is None or (least is not None and not found >= least):
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


def _unit(field: Field[Any]) -> str:
    default = field.default
    kind = "true or false" if isinstance(default, bool) else type(default).__name__
    return str(field.metadata.get("unit") or kind)


def shown(default: object) -> str:
    """Return a parameter's default as a user writes it."""
    if isinstance(default, Policy):
        return default.name
    if isinstance(default, bool):
        return str(default).lower()
    return str(default) or "none"


def as_row(kind: type[Policy]) -> str:
    """Return a policy's row of docs/policies.md: name, idea, own parameters, rhythm, signals."""
    policy, usual = kind(), {f.name: f.default for f in fields(Policy)}
    own = [f for f in fields(kind) if f.name not in usual or f.default != usual[f.name]]
    cells = (
        f"`{kind.name}`",
        idea(kind).removesuffix("."),
        ", ".join(f"`{f.name}={shown(f.default)}`" for f in own),
        policy.default_when,
        policy.exactness(parse_when(policy.default_when)),
        ", ".join(s for s in SIGNALS if s in policy.signals) or "positions",
    )
    return "| " + " | ".join(cells) + " |"
