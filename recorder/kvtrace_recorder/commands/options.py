"""Options that several verbs share."""

from __future__ import annotations

import argparse

from kvtrace.layout import DETAIL_ARRAYS


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
