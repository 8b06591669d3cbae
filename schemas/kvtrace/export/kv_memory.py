"""Bytes of KV memory over time, from the events: what the counters of a timeline show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pyarrow as pa


class Held(NamedTuple):
    """Bytes held on a device after the events of one moment."""

    ts_ns: int
    device: str
    bytes: int


#: A block: (device, "block", cache group, block). A layer of a cache: (device, "cache", model,
#: layer, request), the last null where an event is about the whole batch.
_Key = tuple[Any, ...]


class _Memory:
    """What is held, piece by piece, and the sums by device."""

    def __init__(self) -> None:
        self._pieces: dict[_Key, int] = {}
        self.totals: dict[str, int] = {}

    def put(self, key: _Key, nbytes: int) -> None:
        device = key[0]
        self.totals[device] = self.totals.get(device, 0) + nbytes - self._pieces.get(key, 0)
        self._pieces[key] = nbytes
        if not nbytes:
            del self._pieces[key]

    def drop(self, *start: Any) -> None:
        """Let go of every piece whose key goes on like this behind the device."""
        for key in [key for key in self._pieces if key[1 : 1 + len(start)] == start]:
            self.put(key, 0)


def kv_memory(
    events: pa.Table, step_models: Mapping[int, int], request_models: Mapping[int, int]
) -> Iterator[Held]:
    """Yield what is held after each moment at which it changed.

    Parameters
    ----------
    events : pyarrow.Table
        Rows of `kv_events` of one rank; those that do not say their bytes count for nothing.
    step_models, request_models : mapping of int to int
        The model of each step and of each request.
    """
    memory = _Memory()
    shown: dict[str, int] = {}
    last = None
    for event in events.sort_by("ts_ns").to_pylist():
        if last is not None and event["ts_ns"] != last:
            yield from _changed(last, memory.totals, shown)
        last = event["ts_ns"]
        _apply(memory, event, step_models, request_models)
    if last is not None:
        yield from _changed(last, memory.totals, shown)


def _changed(ts_ns: int, totals: Mapping[str, int], shown: dict[str, int]) -> Iterator[Held]:
    for device, nbytes in totals.items():
        if shown.get(device) != nbytes:
            shown[device] = nbytes
            yield Held(ts_ns, device, nbytes)


def _apply(
    memory: _Memory,
    event: Mapping[str, Any],
    step_models: Mapping[int, int],
    request_models: Mapping[int, int],
) -> None:
    device = event["device"] or "unknown device"
    if event["block"] is not None:
        if event["bytes"] is not None:
            memory.put((device, "block", event["cache_group"], event["block"]), event["bytes"])
        return
    model = request_models.get(event["request"], step_models.get(event["step"]))
    if event["event"] in ("clear", "reset") and event["request"] is None:
        memory.drop("block")
    elif event["event"] == "free" and event["layer"] is None:
        # A batch is freed request by request, at once: its cache is one.
        memory.drop("cache", model)
    elif event["layer"] is not None and event["bytes"] is not None:
        # A cache that was moved is not where it was.
        memory.drop("cache", model, event["layer"], event["request"])
        memory.put((device, "cache", model, event["layer"], event["request"]), event["bytes"])
