"""Options that several verbs share."""

from __future__ import annotations

import argparse
from typing import Any

from kvtrace.layout import DETAIL_ARRAYS
from kvtrace_recorder.selection import MAX_BYTES, check_verify, parse_selection


def add_recording_options(parser: argparse.ArgumentParser, *, out: str) -> None:
    """Declare --out, --force and what `add_kept` does."""
    parser.add_argument("--out", metavar="T", help=f"the trace to make ({out})")
    add_kept(parser)
    add_force(parser)


def add_kept(parser: argparse.ArgumentParser) -> None:
    """Declare what is kept: read it back with `kept`."""
    parser.add_argument(
        "--detail",
        choices=tuple(reversed(DETAIL_ARRAYS)),
        default="qkv",
        help="what to keep: queries, keys and values; no values; norms and received attention of"
        " each key; only events (default: qkv)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "float32"),
        default="float16",
        help="storage type of q, k and v (default: float16)",
    )
    parser.add_argument("--layers", metavar="0,4-7", help="only these layers (default: all)")
    parser.add_argument(
        "--heads",
        metavar="0,2",
        help="only these KV heads of each layer and their query heads (default: all)",
    )
    parser.add_argument(
        "--queries",
        metavar="last=N|every=N|all",
        default="all",
        help="of a prompt only these queries, and what each key received from all of them; of"
        " decoded tokens always all (default: all)",
    )
    parser.add_argument(
        "--max-bytes",
        metavar="N",
        default=MAX_BYTES,
        help="bytes of rows before compression, or none: what does not fit is thinned (prompt"
        " queries before the last 64, then values, then layers), each time noted in the trace"
        f" (default: {MAX_BYTES})",
    )
    parser.add_argument(
        "--durable",
        action="store_true",
        help="every commit outlives a power cut, not only the death of the program",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="recompute a sample of attention outputs from the trace and compare them with the"
        " model's own",
    )


def kept(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_kept` declared, as arguments of `record`.

    Raises
    ------
    InputError
        For layers, heads, queries or bytes that cannot be read.
    """
    chosen = {name: getattr(args, name) for name in ("layers", "heads", "queries", "max_bytes")}
    parse_selection(**chosen)
    check_verify(args.verify, args.detail)
    plain = {name: getattr(args, name) for name in ("detail", "dtype", "durable", "verify")}
    return {**plain, **chosen}


def add_force(parser: argparse.ArgumentParser) -> None:
    """Declare --force."""
    parser.add_argument("--force", action="store_true", help="replace an existing trace")
