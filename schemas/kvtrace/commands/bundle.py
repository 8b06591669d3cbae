r"""Put a trace into one zip that replays the same elsewhere, or take it out again.

Every file's SHA-256 is inside and compared when it is taken out; the same trace always makes the
same bytes. What is derived (trace.duckdb, cache/) is left out and rebuilt by whoever opens it.

Example: kvtrace bundle traces/demo.kvtrace --out demo.zip
         kvtrace bundle demo.zip --extract elsewhere/demo.kvtrace
"""

from __future__ import annotations

import argparse
from pathlib import Path

import kvtrace
from kvtrace.bundle import extract_bundle, write_bundle
from kvtrace.console import console, human_bytes, progress
from kvtrace.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("source", type=Path, metavar="T|X.zip", help="a trace, or a bundle")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--out",
        type=Path,
        metavar="X.zip",
        help="put the trace into this file (default: its name, here)",
    )
    what.add_argument(
        "--extract",
        type=Path,
        metavar="T",
        help="take a bundle out into this new folder (default: its name, here)",
    )
    parser.add_argument("--force", action="store_true", help="replace what is there")


def run(args: argparse.Namespace) -> int:
    """Pack or unpack."""
    if args.extract is None and args.out is None and args.source.is_file():
        args.extract = Path(f"{args.source.stem}.kvtrace")
    if args.extract is not None:
        return _extract(args.source, args.extract, force=args.force)
    if args.source.is_file():
        raise InputError(
            f"{args.source} is a file; a .kvtrace directory was expected;"
            " to take a bundle out, give --extract"
        )
    trace = kvtrace.open(args.source)
    out = args.out or Path(f"{trace.name}.zip")
    with progress("packing") as tell:
        files = write_bundle(trace, out, force=args.force, progress=tell)
    console().print(
        f"{out}: {files} files, {human_bytes(out.stat().st_size)}; elsewhere: kvtrace bundle {out}"
        f" --extract {trace.name}.kvtrace",
        markup=False,
    )
    return 0


def _extract(bundle: Path, out: Path, *, force: bool) -> int:
    with progress("unpacking") as tell:
        extract_bundle(bundle, out, force=force, progress=tell)
    trace = kvtrace.open(out)
    console().print(
        f"{out}: {trace.rows:,} rows, every file as it was packed; next: kvtrace info {out}",
        markup=False,
    )
    return 0
