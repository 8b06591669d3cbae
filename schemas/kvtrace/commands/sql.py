"""Ask a trace in SQL.

Read-only: one SELECT (or DESCRIBE, SHOW TABLES) in DuckDB's dialect, over the tables of the trace.
Without one: what there is to ask, and what each table and view holds.

The first query of sinks, heads or keys computes what attention says of them, once.

Example: kvtrace sql traces/demo.kvtrace "select phase, count(*) from steps group by phase"
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Column, Table

import kvtrace
from kvtrace.console import console
from kvtrace.errors import InputError
from kvtrace.functions import FUNCTIONS
from kvtrace.sql import MEMORY_LIMIT, TIMEOUT_S, derive, row_counts
from kvtrace.tables import catalog


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("trace", metavar="T", help="a .kvtrace directory")
    parser.add_argument(
        "query", metavar="SELECT", nargs="?", help="one SQL statement; without: list the tables"
    )
    parser.add_argument("--describe", metavar="NAME", help="columns of a table or view, explained")
    parser.add_argument(
        "--derive", action="store_true", help="compute what the views of attention need, now"
    )
    parser.add_argument(
        "--format",
        choices=("table", "json", "csv", "parquet"),
        help="default: table, or what the name of --out says",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write there instead of printing")
    parser.add_argument(
        "--memory-limit", default=MEMORY_LIMIT, metavar="SIZE", help=f"default: {MEMORY_LIMIT}"
    )
    parser.add_argument(
        "--timeout", type=float, default=TIMEOUT_S, metavar="S", help=f"default: {TIMEOUT_S:g} s"
    )


def run(args: argparse.Namespace) -> int:
    """Print or write the result."""
    trace = kvtrace.open(args.trace)
    if args.derive:
        derive(trace)
    if args.describe is not None:
        _print_columns(args.describe)
    if args.query is not None:
        _answer(trace, args)
    elif args.describe is None and not args.derive:
        _print_catalog(trace)
    return 0


def _answer(trace: kvtrace.Trace, args: argparse.Namespace) -> None:
    form = args.format or _form_of(args.out)
    if args.out is None and form == "parquet":
        raise InputError("parquet is a file format; --out FILE was expected")
    if args.out is not None and form == "table":
        raise InputError("a table is for reading, not for files; use --format csv, json or parquet")
    found = trace.sql(args.query, memory_limit=args.memory_limit, timeout_s=args.timeout)
    if args.out is not None:
        _write(found, form, args.out)
    elif form == "table":
        _print_table(found)
    else:
        sys.stdout.write(_TEXTS[form](found))


def _print_catalog(trace: kvtrace.Trace) -> None:
    """Tables, views and functions: how many rows, and what they hold."""
    rows = row_counts(trace)
    table = Table("name", "kind", Column("rows", justify="right"), "what it holds")
    # The views first: they are what most questions begin with.
    for one in sorted(catalog(), key=lambda one: one.kind != "view"):
        count = f"{rows[one.name]:,}" if one.name in rows else ""
        table.add_row(one.name, one.kind, count, one.comment)
    for function in FUNCTIONS:
        table.add_row(function.signature, "function", "", function.comment)
    console().print(table, markup=False)


def _print_columns(name: str) -> None:
    """The columns of a table or view, with their types and comments."""
    found = next((one for one in catalog() if one.name == name.lower()), None)
    if found is None:
        raise InputError(
            f"table {name!r} was not found; one of"
            f" {', '.join(one.name for one in catalog())} was expected"
        )
    out = console()
    out.print(f"{found.name} ({found.kind}): {found.comment}", markup=False)
    table = Table("column", "type", "what it is")
    for column in found.columns:
        table.add_row(column.name, column.type, column.comment or "")
    out.print(table, markup=False)


def _form_of(out: Path | None) -> str:
    if out is None:
        return "table"
    return {".json": "json", ".parquet": "parquet"}.get(out.suffix, "csv")


def _write(found: pa.Table, form: str, out: Path) -> None:
    try:
        if form == "parquet":
            pq.write_table(found, out)
        else:
            out.write_text(_TEXTS[form](found), encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{out} cannot be written ({error.strerror or error}); choose another --out"
        ) from error


def _json(found: pa.Table) -> str:
    return json.dumps(_finite(found.to_pylist()), default=str, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    return value


def _csv(found: pa.Table) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(found.column_names)
    writer.writerows(zip(*(column.to_pylist() for column in found.columns), strict=True))
    return text.getvalue()


_TEXTS = {"json": _json, "csv": _csv}


def _print_table(found: pa.Table, limit: int = 1000) -> None:
    table = Table(*found.column_names)
    for row in found.slice(0, limit).to_pylist():
        table.add_row(*(_cell(value) for value in row.values()))
    out = console()
    out.print(table, markup=False)
    hidden = found.num_rows - limit
    if hidden > 0:
        out.print(f"{hidden} more rows; --format csv or json prints all")


def _cell(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, float):
        return f"{value:.6g}"
    # A token's newline or tab would tear the table.
    return str(value).replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
