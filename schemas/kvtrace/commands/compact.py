r"""Write a trace anew in large pieces: it opens and answers faster, and is the same.

While recording, every commit adds small files, and a recorder that died leaves its last rows in
small chunks. This makes large segments and full shards of them. Readers see the old trace or the
new one, whole, at any moment; a trace that is being recorded is refused.

Example: kvtrace compact traces/served.kvtrace
"""

from __future__ import annotations

import argparse

import kvtrace
from kvtrace.compact import compact
from kvtrace.console import console, human_bytes, progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("trace", metavar="T", help="a .kvtrace directory")


def run(args: argparse.Namespace) -> int:
    """Compact."""
    trace = kvtrace.open(args.trace)
    with progress("compacting") as tell:
        found = compact(trace, tell)
    out = console()
    if not found.ranks:
        out.print(f"{args.trace}: nothing to do, it is compact", markup=False)
        return 0
    before, after = (human_bytes(size) for size in found.bytes)
    out.print(
        f"{args.trace}: {found.segments[0]:,} segments to {found.segments[1]:,}, {before} to"
        f" {after}",
        markup=False,
    )
    return 0
