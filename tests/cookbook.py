"""The cookbook's questions: read from docs/cookbook.md, and their answers written into it.

python -m tests.cookbook traces/demo.kvtrace
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

import kvtrace

PAGE = Path(__file__).resolve().parents[1] / "docs/cookbook.md"
_RECIPE = re.compile(
    r"(?P<before>^### (?P<title>[^\n]*)\n[^#]*?```sql\n(?P<sql>.*?)```\n)"
    r"(?P<answer>\n\|.*?\n(?=\n|\Z))?",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Recipe:
    """A question, its SQL, and the answer that the page shows."""

    title: str
    sql: str
    answer: str


def recipes() -> list[Recipe]:
    """All of them, in order."""
    text = PAGE.read_text(encoding="utf-8")
    return [
        Recipe(found["title"], found["sql"], (found["answer"] or "").strip())
        for found in _RECIPE.finditer(text)
    ]


def table_text(found: pa.Table) -> str:
    """An answer as the page shows it."""
    lines = [found.column_names, ["---"] * found.num_columns]
    lines += [[_cell(value) for value in row.values()] for row in found.to_pylist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, str):
        # A token's spaces and newlines are part of it.
        return f"`{value!r}`".replace("|", "\\|") if re.search(r"\W", value) else value
    if isinstance(value, float):
        return f"{value:g}" if abs(value) < 1e5 else f"{value:.0f}"
    return "" if value is None else str(value)


def _same(shown: Any, exact: Any) -> bool:
    """Whether a value of an answer is the exact one as the question rounds it."""
    if shown is None or isinstance(shown, str):
        return bool(shown == exact) or (shown is None and exact != exact)
    decimals = len(f"{shown:.10f}".rstrip("0").partition(".")[2]) if shown % 1 else 0
    # Sums of float32 in another order may fall on the other side of a rounding.
    return abs(float(shown) - float(exact)) <= 1.01 * 10.0**-decimals


def agree(answer: list[dict[str, Any]], by_hand: list[tuple[Any, ...]]) -> bool:
    """Whether SQL and numpy say the same."""
    pairs = list(zip(answer, by_hand, strict=False))
    return len(answer) == len(by_hand) and all(
        _same(x, y) for a, b in pairs for x, y in zip(a.values(), b, strict=True)
    )


def fill(trace: kvtrace.Trace) -> None:
    """Write what the trace answers into the page."""

    def answered(found: re.Match[str]) -> str:
        return f"{found['before']}\n{table_text(trace.sql(found['sql']))}\n"

    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(_RECIPE.sub(answered, text), encoding="utf-8")


if __name__ == "__main__":
    fill(kvtrace.open(sys.argv[1]))
