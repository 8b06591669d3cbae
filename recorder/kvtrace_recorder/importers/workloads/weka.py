"""Conversations of WEKA's kv-cache-tester: a JSON file each, with `requests` and `hash_ids`.

A conversation has `id`, `block_size` and `requests`, each with `t` (s since its begin), `in`,
`out` (tokens) and `hash_ids`; the requests of a subagent stand in an entry of their own. SOURCE is
one such file or a folder of them, read by name, one conversation after the other. Hash ids are
valid in their file only, unless it says `"hash_id_scope": "global"`.

Example: kvtrace import weka traces --out agents.kvtrace
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kvtrace.console import progress
from kvtrace_recorder.importers.kv_events.problems import Problems
from kvtrace_recorder.importers.workloads.entry import Entry, hash_list, time_ns, whole
from kvtrace_recorder.importers.workloads.files import source_files
from kvtrace_recorder.importers.workloads.write import import_entries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the source."""
    parser.add_argument("source", metavar="SOURCE", help="a conversation, or a folder of them")


def run_import(args: argparse.Namespace, out: Path, command: Sequence[str]) -> None:
    """Make a trace."""
    path = Path(args.source)
    files = source_files(path, "*.json")
    problems = Problems()

    def entries() -> Iterator[tuple[str, Entry]]:
        with progress("importing") as tell:
            for number, file in enumerate(files):
                yield from _conversation(file, problems)
                tell((number + 1) / len(files))

    import_entries(entries(), path, out, command, problems, force=args.force)


def _conversation(file: Path, problems: Problems) -> Iterator[tuple[str, Entry]]:
    try:
        found = json.loads(file.read_bytes())
        if not isinstance(found, dict) or not isinstance(found.get("requests"), list):
            raise ValueError("no list requests")
        size = whole(found, "block_size", least=1)
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error) if type(error) is ValueError else "it cannot be read as JSON"
        problems.note("conversations", reason, file.name)
        return
    local = found.get("hash_id_scope") != "global"
    namespace = file.name if local else None
    for where, record in _requests(found["requests"], "request "):
        place = f"{file.name}, {where}"
        try:
            yield place, _entry(record, size, str(found.get("id", file.stem)), namespace)
        except ValueError as error:
            problems.note("requests", str(error), place)


def _requests(records: list[Any], where: str) -> Iterator[tuple[str, Any]]:
    """Requests in order, those of subagents where they stand."""
    for number, record in enumerate(records, start=1):
        nested = record.get("requests") if isinstance(record, dict) else None
        if isinstance(nested, list):
            yield from _requests(nested, f"{where}{number}.")
        else:
            yield f"{where}{number}", record


def _entry(record: Any, size: int, conversation: str, namespace: str | None) -> Entry:
    if not isinstance(record, dict):
        raise ValueError("no JSON object")
    return Entry(
        arrival_ns=time_ns(record, "t", 1_000_000_000),
        input_tokens=whole(record, "in"),
        output_tokens=whole(record, "out"),
        block_size=size,
        hashes=hash_list(record, "hash_ids"),
        external_id=conversation,
        namespace=namespace,
    )
