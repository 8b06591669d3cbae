"""Options that several verbs share."""

from __future__ import annotations

import argparse
from pathlib import Path

from kvtrace.errors import TraceError
from kvtrace.layout import DETAIL_ARRAYS
from kvtrace.manifest import is_trace


def add_recording_options(parser: argparse.ArgumentParser, *, out: str) -> None:
    """Declare --out, --detail, --dtype and --force."""
    parser.add_argument("--out", metavar="T", help=f"the trace to make ({out})")
    parser.add_argument(
        "--detail",
        choices=tuple(reversed(DETAIL_ARRAYS)),
        default="qkv",
        help="what to keep: queries, keys and values; no values; only events (default: qkv)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "float32"),
        default="float16",
        help="storage type of q, k and v (default: float16)",
    )
    add_force(parser)


def add_force(parser: argparse.ArgumentParser) -> None:
    """Declare --force."""
    parser.add_argument("--force", action="store_true", help="replace an existing trace")


def refuse_existing(path: Path, *, force: bool) -> None:
    """Refuse a trace that exists before something slow or a child process begins.

    Raises
    ------
    TraceError
        Where `path` is no trace, or is one and `force` is not given.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not is_trace(path):
        raise TraceError(
            f"{path} exists and is not a trace; a new path was expected; choose another --out"
        )
    if not force:
        raise TraceError(
            f"{path} exists; a new path was expected; choose another --out,"
            " or --force to replace it"
        )
