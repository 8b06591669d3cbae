"""From requests and their blocks to the tables of a trace: `requests`, `block_accesses`, `gaps`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace.console import progress
from kvtrace.errors import InputError
from kvtrace.writer import TraceWriter
from kvtrace_recorder.importers.kv_events.problems import Problems
from kvtrace_recorder.importers.workloads.contents import contents
from kvtrace_recorder.importers.workloads.entry import Entry
from kvtrace_recorder.importers.workloads.json_lines import JsonLines

#: Rows of one commit: a file per table and commit. What is held in memory is in proportion to it.
_COMMIT_ROWS = 1_000_000

#: What a format makes of one record; raises ValueError, with a short reason, for a bad one.
Parse = Callable[[dict[str, Any]], Entry]


class WorkloadWriter:
    """Writes requests in the order in which they come.

    Parameters
    ----------
    writer : TraceWriter
        The trace, of detail events. The caller closes it, after `finish`.
    problems : Problems
        Where requests that make no sense are counted.
    """

    def __init__(self, writer: TraceWriter, problems: Problems) -> None:
        self._writer = writer
        self._problems = problems
        self._entries: list[Entry] = []
        self._blocks: list[tuple[NDArray[np.int64], NDArray[np.int32]]] = []
        self._pending = 0
        self.requests = 0

    def add(self, entry: Entry) -> None:
        """Add a request.

        Raises
        ------
        ValueError
            Where its blocks do not fit its tokens.
        """
        tokens = entry.block_tokens()
        self._blocks.append((contents(entry.hashes, entry.namespace), tokens))
        self._entries.append(entry)
        self._pending += len(tokens) + 1
        if self._pending >= _COMMIT_ROWS:
            self.commit()

    def commit(self) -> None:
        """Make everything that was added visible to readers."""
        self._problems.write(self._writer)
        if self._entries:
            self._writer.append("block_accesses", self._accesses())
            self._writer.append("requests", self._rows())
            self.requests += len(self._entries)
        self._writer.commit()
        self._entries.clear()
        self._blocks.clear()
        self._pending = 0

    def finish(self) -> None:
        """Write what is left."""
        self._problems.write(self._writer, final=True)
        self.commit()

    def _accesses(self) -> dict[str, NDArray[Any]]:
        counts = np.array([len(tokens) for _, tokens in self._blocks])
        numbers = np.arange(self.requests, self.requests + len(counts))
        first = np.repeat(np.cumsum(counts) - counts, counts)
        index = (np.arange(len(first)) - first).astype(np.int32)
        sizes = np.repeat([entry.block_size for entry in self._entries], counts)
        prompts = np.repeat([entry.input_tokens for entry in self._entries], counts)
        return {
            "request": np.repeat(numbers, counts),
            "block_index": index,
            "content": np.concatenate([found for found, _ in self._blocks]),
            "tokens": np.concatenate([tokens for _, tokens in self._blocks]),
            "is_output": index * sizes >= prompts,
        }

    def _rows(self) -> dict[str, list[Any]]:
        entries = self._entries
        return {
            "request": list(range(self.requests, self.requests + len(entries))),
            "run": [0] * len(entries),
            "external_id": [entry.external_id for entry in entries],
            "prompt_tokens": [entry.input_tokens for entry in entries],
            "started_ns": [entry.arrival_ns for entry in entries],
            "output_tokens": [entry.output_tokens for entry in entries],
            "block_size": [entry.block_size for entry in entries],
            "namespace": [entry.namespace for entry in entries],
        }


def import_lines(args: argparse.Namespace, out: Path, command: Sequence[str], parse: Parse) -> None:
    """Make a trace of a file of JSON lines, a request a line.

    Raises
    ------
    InputError
        Where the file cannot be read or holds no request.
    TraceError
        Where `out` exists and may not be replaced.
    """
    path = Path(args.source)
    problems = Problems()
    with JsonLines(path, problems) as lines, progress("importing") as tell:

        def entries() -> Iterator[tuple[str, Entry]]:
            for found in parsed(lines, parse, problems):
                yield found
                tell(lines.share)

        import_entries(entries(), path, out, command, problems, force=args.force)


def import_entries(
    entries: Iterator[tuple[str, Entry]],
    path: Path,
    out: Path,
    command: Sequence[str],
    problems: Problems,
    *,
    force: bool,
) -> None:
    """Make a trace of requests, each with its place in the source; says what was left out."""
    first = next(entries, None)
    if first is None:
        raise InputError(
            f"{path} holds no request ({'; '.join(problems.lines()) or 'it is empty'});"
            f" see kvtrace import {command[2]} --help; check the file and the format"
        )
    with TraceWriter(
        out, source="imported", command=command, detail="events", force=force
    ) as writer:
        workload = WorkloadWriter(writer, problems)
        found: tuple[str, Entry] | None = first
        while found is not None:
            place, entry = found
            try:
                workload.add(entry)
            except ValueError as error:
                problems.note("requests", str(error), place)
            found = next(entries, None)
        workload.finish()
    for line in problems.lines():
        print(f"kvtrace: {line}", file=sys.stderr)


def parsed(lines: JsonLines, parse: Parse, problems: Problems) -> Iterator[tuple[str, Entry]]:
    """Requests of a file with their places; lines that a format refuses are counted."""
    for place, record in lines.objects():
        try:
            yield place, parse(record)
        except ValueError as error:
            problems.note("lines", str(error), place)
