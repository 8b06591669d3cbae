"""Lookups that an LMCache server logged: JSON lines with `chunk_hashes` (--lookup-hash-log-dir).

Each line is a lookup: `timestamp` (s), `request_id`, `model_name`, `chunk_size`, `seq_len`
(tokens) and `chunk_hashes` of its full chunks. SOURCE is a file, or the folder of the rotated
logs (lookup_hashes_*.jsonl), read by name. Chunks of different models are different.

Example: kvtrace import lmcache /data/lmcache/lookup_hashes --out lookups.kvtrace
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kvtrace.console import progress
from kvtrace_recorder.importers.kv_events.problems import Problems
from kvtrace_recorder.importers.workloads.entry import Entry, hash_list, time_ns, whole
from kvtrace_recorder.importers.workloads.files import source_files
from kvtrace_recorder.importers.workloads.json_lines import JsonLines
from kvtrace_recorder.importers.workloads.write import import_entries, parsed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the source."""
    parser.add_argument("source", metavar="SOURCE", help="a log, or a folder of rotated logs")


def run_import(args: argparse.Namespace, out: Path, command: Sequence[str]) -> None:
    """Make a trace."""
    path = Path(args.source)
    files = source_files(path, "lookup_hashes_*.jsonl*")
    problems = Problems()

    def entries() -> Iterator[tuple[str, Entry]]:
        with progress("importing") as tell:
            for number, file in enumerate(files):
                where = f"{file.name}, " if len(files) > 1 else ""
                with JsonLines(file, problems, where) as lines:
                    for found in parsed(lines, _parse, problems):
                        yield found
                        tell((number + lines.share) / len(files))

    import_entries(entries(), path, out, command, problems, force=args.force)


def _parse(record: dict[str, Any]) -> Entry:
    model, request = record.get("model_name"), record.get("request_id")
    return Entry(
        arrival_ns=time_ns(record, "timestamp", 1_000_000_000),
        input_tokens=whole(record, "seq_len"),
        output_tokens=None,
        block_size=whole(record, "chunk_size", least=1),
        hashes=hash_list(record, "chunk_hashes"),
        external_id=None if request is None else str(request),
        namespace=None if model is None else str(model),
    )
