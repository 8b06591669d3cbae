r"""Write a trace in the forms that other programs read.

Attention maps of chosen layers, heads and rows (Zarr or npz), tables (Parquet), a timeline for
ui.perfetto.dev or chrome://tracing, and spans for OpenTelemetry. Several forms may be asked for at
once.

Example: kvtrace export traces/demo.kvtrace --attention --layers 0,2-3 --heads 0 --rows 0-63 \
             --out maps.npz
         kvtrace export traces/demo.kvtrace --tables tables/ --perfetto timeline.json.gz \
             --otel spans.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import kvtrace
from kvtrace.console import console, progress
from kvtrace.errors import InputError
from kvtrace.numbers import parse_numbers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("trace", metavar="T", help="a .kvtrace directory")
    maps = parser.add_argument_group("attention maps")
    maps.add_argument("--attention", action="store_true", help="write them to --out")
    maps.add_argument("--out", type=Path, metavar="X.zarr|X.npz", help="where the maps go")
    for name, what in (
        ("layers", "layers"),
        ("heads", "query heads of each"),
        ("rows", "positions of queries"),
        ("keys", "positions of keys"),
    ):
        maps.add_argument(f"--{name}", metavar="0,4-7", help=f"only these {what} (default: all)")
    maps.add_argument("--request", type=int, metavar="N", help="default: the first")
    parser.add_argument(
        "--tables", type=Path, metavar="DIR", help="a Parquet file for each table, in a new folder"
    )
    parser.add_argument(
        "--perfetto",
        type=Path,
        metavar="FILE",
        help="steps, requests and KV memory over time, as Chrome's JSON (.json or .json.gz)",
    )
    parser.add_argument(
        "--otel", type=Path, metavar="FILE", help="requests as OpenTelemetry spans, as OTLP/JSON"
    )
    parser.add_argument("--force", action="store_true", help="replace what is there")


def run(args: argparse.Namespace) -> int:
    """Write what was asked for."""
    if args.attention != (args.out is not None):
        raise InputError("--attention and --out go together; name the maps' file with --out X.npz")
    forms = [(form, getattr(args, form)) for form in _FORMS if getattr(args, form) is not None]
    if not forms:
        raise InputError(
            "nothing to write was named; --attention --out, --tables, --perfetto or --otel was"
            " expected; see kvtrace export --help"
        )
    trace = kvtrace.open(args.trace)
    for form, out in forms:
        with progress(f"writing {out}") as tell:
            said = _FORMS[form](trace, out, args, tell)
        console().print(f"{out}: {said}", markup=False)
    return 0


Tell = Callable[[float], None]


def _attention(trace: kvtrace.Trace, out: Path, args: argparse.Namespace, tell: Tell) -> str:
    from kvtrace.export.attention import Choice, export_attention

    chosen = {
        name: parse_numbers(name, getattr(args, name))
        for name in ("layers", "heads", "rows", "keys")
    }
    choice = Choice(_first(trace) if args.request is None else args.request, **chosen)
    names = export_attention(trace, out, choice, force=args.force, progress=tell)
    return f"{', '.join(names)} [head, row, key] of request {choice.request}"


def _first(trace: kvtrace.Trace) -> int:
    requests = trace.requests()
    return requests[0].request if requests else 0


def _tables(trace: kvtrace.Trace, out: Path, args: argparse.Namespace, tell: Tell) -> str:
    from kvtrace.export.tables import export_tables

    return f"{len(export_tables(trace, out, force=args.force, progress=tell))} tables"


def _perfetto(trace: kvtrace.Trace, out: Path, args: argparse.Namespace, tell: Tell) -> str:
    from kvtrace.export.perfetto import export_perfetto

    count = export_perfetto(trace, out, force=args.force, progress=tell)
    return f"{count:,} events; open it at ui.perfetto.dev"


def _otel(trace: kvtrace.Trace, out: Path, args: argparse.Namespace, tell: Tell) -> str:
    from kvtrace.export.otel import export_otel

    return f"{export_otel(trace, out, force=args.force, progress=tell)} spans"


#: By the option that names the file.
_FORMS = {"out": _attention, "tables": _tables, "perfetto": _perfetto, "otel": _otel}
