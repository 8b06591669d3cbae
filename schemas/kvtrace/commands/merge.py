r"""Make one trace of several: of servers, of runs, of machines.

Each rank of each trace becomes a rank of the new one; requests, rows, steps, models and blocks get
new numbers, replays come along, and runs.merged_from says where each rank came from. Nothing that
was recorded or replayed is left out, and everything is checked on the way. What kvtrace tiers kept
stays with its trace.

Example: kvtrace merge server-a.kvtrace server-b.kvtrace --out both.kvtrace
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import kvtrace
from kvtrace.console import console, human_bytes, progress
from kvtrace.merge import merge


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("traces", nargs="+", metavar="T", help=".kvtrace directories")
    parser.add_argument("--out", type=Path, required=True, metavar="T", help="the trace to make")
    parser.add_argument("--force", action="store_true", help="replace what is there")


def run(args: argparse.Namespace) -> int:
    """Merge."""
    traces = [kvtrace.open(path) for path in args.traces]
    with progress("merging") as tell:
        found = merge(traces, args.out, command=sys.argv, force=args.force, progress=tell)
    if len(traces) == 1:
        console().print(
            "one trace was given: the new one holds the same, its ranks numbered from 0",
            markup=False,
        )
    console().print(
        f"{args.out}: {found.rows:,} rows of {len(found.requests())} requests in"
        f" {len(found.ranks)} ranks, {human_bytes(found.bytes)}; next: kvtrace info {args.out}",
        markup=False,
    )
    return 0
