"""From KV events to the tables of a trace: `kv_events`, `blocks`, `requests`, `gaps`."""

from __future__ import annotations

import json
from typing import Any

from kvtrace.writer import TraceWriter
from kvtrace_recorder.importers.kv_events.decode import (
    AllBlocksCleared,
    Batch,
    BlockRemoved,
    BlockStored,
)
from kvtrace_recorder.importers.kv_events.problems import Problems
from kvtrace_recorder.importers.kv_events.watch import Source

_EVENT_COLUMNS = ("ts_ns", "request", "block", "event", "tokens", "device", "cache_group")
_BLOCK_COLUMNS = ("block", "hash", "parent", "block_size", "token_ids", "details")
#: Where an emptied or restarted engine's own cache lies: a medium that is not named is the GPU's.
_ENGINE = ("gpu", None)

#: Blocks of one cache: hash to number.
_Numbers = dict[str, int]
_Cache = tuple[Source, int | None]


class EventWriter:
    """Writes batches of events; numbers blocks in the order in which they are first seen.

    A block is one hash in one cache group of one publisher. It may lie on several devices.

    Parameters
    ----------
    writer : TraceWriter
        The trace, of detail events. The caller closes it, after `finish`.
    problems : Problems
        Where events that make no sense are counted.
    """

    def __init__(self, writer: TraceWriter, problems: Problems) -> None:
        self._writer = writer
        self._problems = problems
        self._numbers: dict[_Cache, _Numbers] = {}
        #: Seen as a parent or removed, but never stored: described at the end by its hash alone.
        self._undescribed: dict[int, str] = {}
        #: What lies where: the cache group by block.
        self._held: dict[tuple[Source, str | None], dict[int, int | None]] = {}
        self._requests: dict[str, int] = {}
        self._events: list[tuple[Any, ...]] = []
        self._blocks: list[tuple[Any, ...]] = []
        self._new_requests: list[tuple[int, str, int]] = []
        self._ts_ns = 0
        self.events = 0
        self.blocks = 0

    @property
    def pending(self) -> int:
        """Rows of events and blocks that wait for `commit`."""
        return len(self._events) + len(self._blocks)

    def write(self, source: Source, batch: Batch) -> None:
        """Add the events of one message."""
        if batch.ts_ns is None and batch.events:
            self._problems.note("event times", "no time in the message: numbered in order")
        self._ts_ns = self._ts_ns if batch.ts_ns is None else batch.ts_ns - 1
        for event in batch.events:
            if isinstance(event, BlockStored):
                self._store(source, event)
            elif isinstance(event, BlockRemoved):
                self._remove(source, event)
            else:
                self._clear(source, event)

    def restart(self, source: Source, before: int, after: int, ts_ns: int | None) -> None:
        """Note that a publisher began again: its engine's cache is empty."""
        reason = (
            f"{_name(source)} restarted: after message {before} came message {after} of a new"
            " count; the blocks it held are cleared"
        )
        self._writer.add_gap("publisher restarts", 1, reason)
        self._ts_ns = self._ts_ns if ts_ns is None else ts_ns - 1
        for device in (*_ENGINE, *self._devices(source, beginning="cpu")):
            self._empty(source, device)

    def lost(self, source: Source, missing: range, why: str) -> None:
        """Note messages that are not to be had."""
        numbers = f"{missing[0]}" if len(missing) == 1 else f"{missing[0]} to {missing[-1]}"
        reason = f"{_name(source)}, sequence {numbers}: {why}"
        self._writer.add_gap("kv event messages", len(missing), reason)

    def commit(self) -> None:
        """Make everything written so far visible to readers."""
        self._problems.write(self._writer)
        self._flush()
        self._writer.commit()

    def finish(self) -> None:
        """Write what had to wait for the end."""
        for block, text in self._undescribed.items():
            self._blocks.append((block, text, None, None, None, None))
        self._undescribed.clear()
        self._problems.write(self._writer, final=True)
        self._flush()

    def _store(self, source: Source, event: BlockStored) -> None:
        cache = (source, event.group_idx)
        held = self._held.setdefault((source, event.medium), {})
        request = self._request(event.session)
        parent: int | None = None
        if event.parent_block_hash is not None:
            parent = self._number(cache, event.parent_block_hash)
        for index, text in enumerate(event.block_hashes):
            block = self._number(cache, text)
            token_ids = None if event.token_ids is None else event.token_ids[index]
            if self._undescribed.pop(block, None) is not None:
                details = _json(event.details[index], source)
                row = (block, text, parent, event.block_size, token_ids, details)
                self._blocks.append(row)
            tokens = event.block_size if token_ids is None else len(token_ids)
            kind = "touch" if block in held else "store"
            held[block] = event.group_idx
            self._add(request, block, kind, tokens, event.medium, event.group_idx)
            parent = block

    def _remove(self, source: Source, event: BlockRemoved) -> None:
        held = self._held.setdefault((source, event.medium), {})
        for text in event.block_hashes:
            block = self._number((source, event.group_idx), text)
            held.pop(block, None)
            self._add(None, block, "remove", 0, event.medium, event.group_idx)

    def _clear(self, source: Source, event: AllBlocksCleared) -> None:
        self._add(None, None, "clear", None, event.medium, None)
        for device in (event.medium,) if event.medium else _ENGINE:
            self._empty(source, device)

    def _empty(self, source: Source, device: str | None) -> None:
        """A row for each block that lay there, so that a block's last event says where it is."""
        for block, group in self._held.pop((source, device), {}).items():
            self._add(None, block, "clear", 0, device, group)

    def _devices(self, source: Source, beginning: str) -> list[str]:
        return [
            device
            for owner, device in self._held
            if owner == source and device is not None and device.startswith(beginning)
        ]

    def _number(self, cache: _Cache, text: str) -> int:
        numbers = self._numbers.setdefault(cache, {})
        block = numbers.get(text)
        if block is None:
            block = numbers[text] = self.blocks
            self._undescribed[block] = text
            self.blocks += 1
        return block

    def _request(self, session: str | None) -> int | None:
        if session is None:
            return None
        if session not in self._requests:
            self._requests[session] = len(self._requests)
            self._new_requests.append((self._requests[session], session, self._ts_ns + 1))
        return self._requests[session]

    def _add(
        self,
        request: int | None,
        block: int | None,
        event: str,
        tokens: int | None,
        device: str | None,
        group: int | None,
    ) -> None:
        # All events of a message carry one time: a nanosecond each keeps them in order.
        self._ts_ns += 1
        self.events += 1
        self._events.append((self._ts_ns, request, block, event, tokens, device, group))

    def _flush(self) -> None:
        self._append("kv_events", _EVENT_COLUMNS, self._events)
        self._append("blocks", _BLOCK_COLUMNS, self._blocks)
        names = ("request", "external_id", "started_ns")
        self._append("requests", names, self._new_requests)

    def _append(self, table: str, names: tuple[str, ...], rows: list[Any]) -> None:
        if rows:
            columns = zip(*rows, strict=True)
            values = {name: list(column) for name, column in zip(names, columns, strict=True)}
            self._writer.append(table, values)
            rows.clear()


def _name(source: Source) -> str:
    parts = [f"topic {source.topic}"] if source.topic else []
    if source.rank is not None:
        parts.append(f"rank {source.rank}")
    return "publisher" + (f" ({', '.join(parts)})" if parts else "")


def _json(details: dict[str, Any], source: Source) -> str | None:
    found = dict(details)
    if source.topic:
        found["topic"] = source.topic
    if source.rank is not None:
        found["data_parallel_rank"] = source.rank
    return json.dumps(found, default=_plain, sort_keys=True) if found else None


def _plain(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)
