"""Block policies as users write them: `name[:key=value,...]`, `file.py:Class[:key=value,...]`."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any, get_type_hints

from kvtrace.errors import InputError
from kvtrace_viewer.blocks.plugins import load_block_policy
from kvtrace_viewer.blocks.policies import POLICIES
from kvtrace_viewer.blocks.policy import BlockPolicy
from kvtrace_viewer.user_files import FILE

_WANTED = {bool: "true or false", int: "a whole number", float: "a number"}


def parse_block_policy(text: str | BlockPolicy) -> BlockPolicy:
    """Make a policy from `name[:key=value,...]` or `file.py:Class[:key=value,...]`.

    Raises
    ------
    InputError
        For an unknown name (the nearest are named), an unknown parameter or a value it cannot
        take (what the policy takes is said), and a file whose policy cannot be loaded.
    """
    if isinstance(text, BlockPolicy):
        return text
    if match := FILE.fullmatch(text):
        kind = load_block_policy(match["file"], match["kind"])
        return _made(text, kind, match["rest"] or "")
    name, _, rest = text.partition(":")
    if name not in POLICIES:
        near = difflib.get_close_matches(name, POLICIES, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "kvtrace blocks --help lists them"
        raise InputError(
            f"block policy {name!r} is unknown; expected one of {', '.join(POLICIES)}; {hint}"
        )
    return _made(text, POLICIES[name], rest)


def _made(text: str, kind: type[BlockPolicy], rest: str) -> BlockPolicy:
    values: dict[str, Any] = {}
    known = {f.name: f for f in fields(kind)}
    hints = get_type_hints(kind)
    for item in rest.split(",") if rest else []:
        key, equals, value = item.partition("=")
        if key not in known or not equals or key in values:
            raise InputError(
                f"block policy {text!r} has {item!r}; expected each parameter once, as key=value;"
                f" {kind.name} takes {describe(kind) or 'none'}"
            )
        values[key] = _value(text, kind, key, value, hints[key], known[key].metadata["least"])
    return kind(**values)


def describe(kind: type[BlockPolicy]) -> str:
    """What a policy takes, with units and defaults, on one line."""
    return ", ".join(f"{f.name} ({f.metadata['unit']}, default {f.default})" for f in fields(kind))


def idea(kind: type[BlockPolicy]) -> str:
    """The first line of a policy's docstring."""
    return (kind.__doc__ or "").strip().partition("\n")[0]


def _value(
    text: str, kind: type[BlockPolicy], key: str, value: str, hint: Any, least: float | None
) -> Any:
    try:
        found = {"true": True, "false": False}[value] if hint is bool else hint(value)
    except (KeyError, ValueError):
        found = None
    # NaN is below nothing, and infinity is no share.
    if found is None or (least is not None and not least <= found < float("inf")):
        bound = "" if least is None else f" of at least {least:g}"
        raise InputError(
            f"block policy {text!r} has {key}={value}; expected {_WANTED[hint]}{bound};"
            f" {kind.name} takes {describe(kind)}"
        )
    return found
