"""The list of policies, for a terminal or as JSON; with a trace, how well it replays each."""

from __future__ import annotations

import json
from typing import Any

from rich.table import Table
from rich.text import Text

import kvtrace
from kvtrace.console import console
from kvtrace.errors import InputError


def list_policies(trace: kvtrace.Trace | None, as_json: bool) -> None:
    """Print every policy: ours, installed packages', with what they take and need."""
    rows = [_row(name) for name in _names()]
    if trace is not None:
        from kvtrace_viewer.replay import replayable

        known = {row["policy"]: row for row in replayable(trace)}
        for row in rows:
            found = known.get(row["policy"], {"replay": None, "reason": None})
            row |= {"replay": found["replay"], "reason": found["reason"]}
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        console().print(_table(rows, trace is not None))


def _names() -> list[str]:
    from kvtrace_viewer.replay.plugins import known_names

    return known_names()


def _row(name: str) -> dict[str, Any]:
    from kvtrace_viewer.replay.plugins import named_policy
    from kvtrace_viewer.replay.spec import describe, idea
    from kvtrace_viewer.replay.when import parse_when

    row: dict[str, Any] = {"policy": name}
    try:
        kind = named_policy(name)
    except InputError as error:
        return row | {"error": str(error)}
    if kind is None:
        return row | {"error": "it went away"}
    policy = kind()
    return row | {
        "idea": idea(kind),
        "when": policy.default_when,
        "exactness": policy.exactness(parse_when(policy.default_when)),
        "needs": sorted(policy.signals),
        "parameters": describe(kind),
    }


def _table(rows: list[dict[str, Any]], with_replay: bool) -> Table:
    table = Table("policy", "what it does", "decides", "class", "needs")
    if with_replay:
        table.add_column("this trace")
    for row in rows:
        texts = [row["policy"], row.get("idea") or row["error"], row.get("when", "-")]
        texts += [row.get("exactness", "-"), ", ".join(row.get("needs", ())) or "positions"]
        if with_replay:
            found = row["replay"] or "-"
            texts.append(f"no: {row['reason']}" if found == "no" else found)
        table.add_row(*map(Text, texts))
    return table
