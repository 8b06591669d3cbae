"""What `kvtrace replay` prints: a row a policy and budget."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rich.table import Table

from kvtrace.console import console

if TYPE_CHECKING:
    from kvtrace_viewer.replay import Result


def show_results(results: list[Result], args: argparse.Namespace) -> None:
    """Print the table, and what a reader of it should know."""
    out = console()
    out.print(_table(results))
    if len({result.when for result in results}) > 1:
        out.print("rows with a different `when` are measured over different rows: compare within")
    if any(result.retained_mass is None for result in results):
        out.print("-: no row follows the first cut, so there is nothing to measure")
    for note in dict.fromkeys(note for result in results for note in result.notes):
        out.print(f"note: {note}", markup=False)
    if _bounds(results):
        out.print(_bounds_explained(results))
    sampled = next((r for r in results if 0 < r.output_rows < r.measured_rows), None)
    if sampled:
        out.print(f"output error over {sampled.output_rows} of {sampled.measured_rows} rows")
    if not args.no_store:
        out.print(f"look at them side by side: kvtrace view {args.trace}", markup=False)
        # The full cache is what the others are held against: nothing to run.
        name = next((r.id for r in reversed(results) if r.policy != "full"), results[-1].id)
        text = f"run the model under one: kvtrace verify {args.trace} --replay {name}"
        out.print(text, markup=False, soft_wrap=True)


def _bounds_explained(results: list[Result]) -> str:
    """Which policies have which bound, where they are not all under the same."""
    names: dict[str | None, list[str]] = {}
    for r in results:
        names.setdefault(r.bound_scope, []).append(r.policy)
    where = {
        "head": "with the same budget in every KV head",
        "layer": "with one budget for the heads of a layer",
        "model": "with one budget for all heads of all layers",
        "read": "by reading as many tokens a query, what top_k retains",
        None: "no bound",
    }
    # Where all are under the same, nobody has to be named.
    said = [
        text if len(names) == 1 else f"{text} ({', '.join(dict.fromkeys(names[scope]))})"
        for scope, text in where.items()
        if scope in names
    ]
    return "bound: the most that any policy can retain " + "; ".join(said)


def _table(results: list[Result]) -> Table:
    table = Table()
    for name in ("policy", "budget", "when", "exactness"):
        table.add_column(name)
    numbers = ("retained mass", "p5", "hits", "misses", "evictions", "sinks kept", "output error")
    bounds = _bounds(results)
    more = [
        name
        for name, there in (("overlap", any(r.overlap for r in results)), ("bound", bounds))
        if there
    ]
    for name in (*numbers, *more):
        table.add_column(name, justify="right")
    for r in results:
        table.add_row(
            r.policy,
            r.budget,
            r.when,
            r.exactness,
            _share(r.retained_mass),
            _share(r.mass_p5),
            f"{r.hits:,}",
            f"{r.misses:,}",
            f"{r.evictions:,}",
            f"{r.retained_sinks}/{r.sinks}",
            _share(r.output_error),
            *(
                _share(r.overlap if name == "overlap" else bounds.get(_at(r, r.bound_scope)))
                for name in more
            ),
        )
    return table


def _at(result: Result, scope: str | None) -> tuple[str, str, str | None]:
    return result.budget, result.when, scope


def _bounds(results: list[Result]) -> dict[tuple[str, str, str | None], float]:
    """By budget, rhythm and what they are over."""
    # Imported here because it pulls in numba, which `--help` does not need.
    from kvtrace_viewer.replay.result import SCOPES

    stated = [(_at(r, scope), r.bound_of(scope)) for r in results for scope in SCOPES]
    return {at: bound for at, bound in stated if bound is not None}


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
