"""SQL from the browser: rows for the grid and CSV for a file."""

from __future__ import annotations

import io
import time
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import BaseModel

from kvtrace.trace import Trace
from kvtrace_viewer.api.downloads import file_response
from kvtrace_viewer.context import Context
from kvtrace_viewer.derived.cells import cell

MAX_GRID_ROWS = 1000
MAX_CSV_ROWS = 1_000_000
TIMEOUT_S = 30.0


class Question(BaseModel):
    """A query and the trace to ask."""

    trace: str
    sql: str


def router(context: Context) -> APIRouter:
    """Routes that answer SQL."""
    routes = APIRouter()

    @routes.post("/sql")
    def ask(question: Question) -> dict[str, Any]:
        opened = context.library.open(question.trace)
        started = time.perf_counter()
        table = _run(opened, question.sql, MAX_GRID_ROWS + 1)
        seconds = time.perf_counter() - started
        shown = table.slice(0, MAX_GRID_ROWS)
        return {
            "columns": [
                {"name": field.name, "type": str(field.type), "numeric": _is_numeric(field.type)}
                for field in table.schema
            ],
            # Lists, since two columns may share a name.
            "rows": [[cell(value) for value in row] for row in zip(*_values(shown), strict=True)],
            "truncated": table.num_rows > MAX_GRID_ROWS,
            "limit": MAX_GRID_ROWS,
            "seconds": seconds,
        }

    @routes.get("/sql.csv")
    def download(trace: str, sql: str) -> Response:
        opened = context.library.open(trace)
        out = io.BytesIO()
        pa_csv.write_csv(_flat(_run(opened, sql, MAX_CSV_ROWS)), out)
        return file_response(out.getvalue(), f"{opened.name}-query.csv", "text/csv")

    return routes


def _run(trace: Trace, sql: str, max_rows: int) -> pa.Table:
    return trace.sql(sql, max_rows=max_rows, timeout_s=TIMEOUT_S)


def _values(table: pa.Table) -> list[list[Any]]:
    return [column.to_pylist() for column in table.columns]


def _flat(table: pa.Table) -> pa.Table:
    """Nested columns as text: CSV has no lists."""
    columns = [
        pa.array([None if value is None else str(value) for value in column.to_pylist()])
        if pa.types.is_nested(column.type)
        else column
        for column in table.columns
    ]
    return pa.table(columns, names=table.column_names)


def _is_numeric(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    )
