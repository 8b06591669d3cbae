"""Ask a trace in SQL.

Read-only: one SELECT (or DESCRIBE, SHOW TABLES) in DuckDB's dialect, over the tables of the trace.

Example: kvtrace sql traces/demo.kvtrace "select phase, count(*) from steps group by phase"
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

import kvtrace
from kvtrace.console import console
from kvtrace.errors import InputError
from kvtrace.sql import MEMORY_LIMIT, TIMEOUT_S


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("trace", metavar="T", help="a .kvtrace directory")
    parser.add_argument("query", metavar="SELECT", help="one SQL statement")
    parser.add_argument(
        "--format",
        choices=("table", "json", "csv", "parquet"),
        default="table",
        help="default: table",
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
    found = trace.sql(args.query, memory_limit=args.memory_limit, timeout_s=args.timeout)
    if args.format == "parquet":
        if args.out is None:
            raise InputError("parquet is a file format; --out FILE was expected")
        pq.write_table(found, args.out)
        return 0
    if args.format == "table" and args.out is None:
        _print_table(found)
        return 0
    text = {"json": _json, "csv": _csv, "table": _csv}[args.format](found)
    if args.out is None:
        sys.stdout.write(text)
    else:
        args.out.write_text(text, encoding="utf-8")
    return 0


def _json(found: pa.Table) -> str:
    return json.dumps(found.to_pylist(), default=str) + "\n"


def _csv(found: pa.Table) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(found.column_names)
    writer.writerows(zip(*(column.to_pylist() for column in found.columns), strict=True))
    return text.getvalue()


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
