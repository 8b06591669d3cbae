"""A workload as Mooncake publishes them: JSON lines of `timestamp`, lengths and `hash_ids`.

Each line is a request: `timestamp` (ms), `input_length`, `output_length` (tokens), `hash_ids` of
its prompt's blocks of 512 tokens, each id standing for the block and everything before it.

Example: kvtrace import mooncake conversation_trace.jsonl --out conversation.kvtrace
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvtrace_recorder.importers.workloads.entry import Entry, hash_list, time_ns, whole
from kvtrace_recorder.importers.workloads.options import add_block_size
from kvtrace_recorder.importers.workloads.write import import_lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the source."""
    parser.add_argument("source", metavar="FILE", help="JSON lines, may be gzipped")
    add_block_size(parser, 512)


def run_import(args: argparse.Namespace, out: Path, command: Sequence[str]) -> None:
    """Make a trace."""

    def parse(record: dict[str, Any]) -> Entry:
        return Entry(
            arrival_ns=time_ns(record, "timestamp", 1_000_000),
            input_tokens=whole(record, "input_length"),
            output_tokens=whole(record, "output_length"),
            block_size=args.block_size,
            hashes=hash_list(record, "hash_ids"),
        )

    import_lines(args, out, command, parse)
