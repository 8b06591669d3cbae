"""A workload as Alibaba's Qwen-Bailian traces: JSON lines with `chat_id` and `hash_ids`.

Each line is a request: `chat_id`, `timestamp` (s), `input_length`, `output_length` (tokens),
`hash_ids` of its blocks of 16 tokens. In traces A and B an id stands for the block's own tokens,
not for what is before it: --chained counts an id behind another prefix as another block, as a
prefix cache must.

Example: kvtrace import qwen-bailian qwen_coder_blksz_16.jsonl --out coder.kvtrace
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvtrace_recorder.importers.workloads.contents import chained
from kvtrace_recorder.importers.workloads.entry import Entry, hash_list, time_ns, whole
from kvtrace_recorder.importers.workloads.options import add_block_size
from kvtrace_recorder.importers.workloads.write import import_lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the source."""
    parser.add_argument("source", metavar="FILE", help="JSON lines, may be gzipped")
    add_block_size(parser, 16)
    parser.add_argument(
        "--chained", action="store_true", help="tell blocks apart by what is before them too"
    )


def run_import(args: argparse.Namespace, out: Path, command: Sequence[str]) -> None:
    """Make a trace."""

    def parse(record: dict[str, Any]) -> Entry:
        chat = record.get("chat_id")
        if not isinstance(chat, int | str):
            raise ValueError("no chat_id")
        hashes = hash_list(record, "hash_ids")
        return Entry(
            arrival_ns=time_ns(record, "timestamp", 1_000_000_000),
            input_tokens=whole(record, "input_length"),
            output_tokens=whole(record, "output_length"),
            block_size=args.block_size,
            hashes=chained(hashes) if args.chained else hashes,
            external_id=str(chat),
        )

    import_lines(args, out, command, parse)
