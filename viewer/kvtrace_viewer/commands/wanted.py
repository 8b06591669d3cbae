"""The evicted tokens that were wanted most, as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from kvtrace.console import console

TEXT_WIDTH = 18


def show_wanted(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a table for each result: `wanted` of `wanted_tokens`, and `regret`, their sum."""
    for name, one in found.items():
        if not one["wanted"]:
            console().print(f"{name}: nothing that was evicted was wanted later", markup=False)
            continue
        title = f"wanted after {name} had evicted it; all regrets: {one['regret']:,.4g}"
        table = Table(title=Text(title), title_justify="left")
        for column in ("token", "text", "evicted after", "wanted most by", "layer.head"):
            table.add_column(column)
        for column in ("attention", "misses", "heads", "regret"):
            table.add_column(column, justify="right")
        for row in one["wanted"]:
            table.add_row(*_cells(row))
        console().print(table)


def _cells(row: Mapping[str, Any]) -> tuple[str | Text, ...]:
    needed = row["query"] is not None
    return (
        str(row["position"]),
        _text(row["text"]),
        str(row["evicted_at"]),
        Text.assemble(f"{row['query']} ", _text(row["query_text"])) if needed else "-",
        f"{row['layer']}.{row['q_head']}" if needed else "-",
        f"{row['attention']:.4f}" if needed else "-",
        f"{row['misses']:,}",
        f"{row['heads']:,}",
        f"{row['regret']:.4f}",
    )


def _text(text: str | None) -> Text:
    # As Python writes it: a line break would tear the table.
    shown = "" if text is None else repr(text)
    return Text(shown if len(shown) <= TEXT_WIDTH else shown[: TEXT_WIDTH - 1] + "…")
