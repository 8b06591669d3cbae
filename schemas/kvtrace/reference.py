"""The reference of tables, views and functions, from their definitions: docs/sql.md.

python -m kvtrace.reference > docs/sql.md
"""

from __future__ import annotations

from collections.abc import Iterator

from kvtrace.functions import FUNCTIONS
from kvtrace.sql import MEMORY_LIMIT, TIMEOUT_S
from kvtrace.tables import TableInfo, catalog

_INTRODUCTION = f"""# SQL over a trace

<!-- Made by: python -m kvtrace.reference > docs/sql.md -->

```sh
kvtrace sql traces/demo.kvtrace                              # what there is to ask
kvtrace sql traces/demo.kvtrace --describe sink_tokens       # its columns, explained
kvtrace sql traces/demo.kvtrace "select * from request_latency"
```

The same in Python is `kvtrace.open(path).sql(query)`, a `pyarrow.Table`, and in the browser the
SQL page of `kvtrace view`. Twenty questions with their answers are in the
[cookbook](cookbook.md).

**Read-only.** One SELECT (or DESCRIBE, SHOW, EXPLAIN) at a time; nothing outside the trace can be
read, no extension loaded, no setting changed. A query may take {MEMORY_LIMIT} of memory and
{TIMEOUT_S:g} seconds; `--memory-limit` and `--timeout` raise that.

**Any DuckDB client.** `trace.duckdb` in the trace holds the same tables and views as plain tables
and views, with their comments; DuckDB 1.1 and later open it, from any directory (1.0 refuses its
small blocks). The functions are not in it: they need the arrays, and so `kvtrace sql`,
`Trace.sql()` or the SQL page.

**Recorded, derived, views.** Recorded tables are what the recorder and replays wrote. Derived
tables are computed from q, k and lse, in about the time of one pass over all attention maps: at
the first query that names one of them, or a view over one. They are kept in the trace's `cache/`,
which may be deleted, and from then on in `trace.duckdb`; before, a plain client finds them empty.
`kvtrace sql T --derive` computes them without a question. While a trace is being recorded, tables
show what was committed last, all of one moment, and of the derived tables only what came since is
computed: requests that did not change are left as they are, and of those that gained tokens the
new queries alone. Computing all took under a second for the demo's 917 tokens and 64 seconds for
2.1 GB of q, k and v (41,270 tokens), on two cores.
"""

_TITLES = {"view": "Views", "derived": "Derived tables", "recorded": "Recorded tables"}


def page() -> str:
    """Text of docs/sql.md."""
    return "\n".join([_INTRODUCTION, *_functions(), *_tables()])


def _functions() -> Iterator[str]:
    yield "## Functions\n"
    yield (
        "Rows, layers and heads are the model's own numbers, as in the tables. They run only for"
        " the rows that a query's filters leave. A row that is not there, or whose query was not"
        " kept, gives NULL; a layer or head that is not there is an error.\n"
    )
    yield "| function | returns | |\n|---|---|---|"
    for one in FUNCTIONS:
        yield f"| `{one.signature}` | `{one.returns}` | {_cell(one.comment)} |"
    yield ""


def _tables() -> Iterator[str]:
    for kind, title in _TITLES.items():
        yield f"## {title}\n"
        for one in catalog():
            if one.kind == kind:
                yield from _table(one)


def _table(table: TableInfo) -> Iterator[str]:
    yield f"### {table.name}\n"
    yield f"{table.comment}\n"
    yield "| column | type | |\n|---|---|---|"
    for column in table.columns:
        yield f"| `{column.name}` | `{column.type}` | {_cell(column.comment or '')} |"
    yield ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
