"""Which requests a step's batch rows belong to: caches are told apart by identity."""

from __future__ import annotations

import itertools
import time
import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace_recorder.messages import Ended

Bools = NDArray[np.bool_]


@dataclass
class RequestState:
    """One sequence as it stands after its last recorded step."""

    request: int
    tokens: int = 0
    last_token: int | None = None


@dataclass
class CacheEntry:
    """The requests that live in one cache, one a batch row.

    Attributes
    ----------
    requests : list of RequestState
        By batch row.
    slots : int
        Key slots a batch row fills, padding included.
    real : numpy.ndarray
        [batch, slots]: whether a slot holds a token rather than padding.
    lost : str or None
        Why no further rows of these requests can be recorded.
    steps : int
        Steps seen.
    sizes : dict of int to (tokens, bytes)
        Of each layer of the cache after the last step.
    """

    requests: list[RequestState]
    slots: int
    real: Bools
    lost: str | None = None
    steps: int = 0
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def recorded(self) -> tuple[int, ...]:
        """Requests with rows in the trace."""
        return tuple(state.request for state in self.requests if state.tokens)

    @property
    def is_contiguous(self) -> bool:
        """Whether no padding stands between the tokens of any row."""
        starts = np.diff(self.real.astype(np.int8), axis=1, prepend=0) == 1
        return bool((starts.sum(axis=1) <= 1).all())


class RequestBook:
    """Maps caches to requests, weakly: a cache that dies ends its requests."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._entries: dict[int, tuple[weakref.ref[Any], CacheEntry]] = {}
        # Filled by weak references' callbacks, which may run anywhere: a deque needs no lock.
        self.ended: deque[Ended] = deque()

    def entry_for(self, cache: Any, past: int, batch: int) -> CacheEntry:
        """The entry that a step belongs to, which holds `past` slots in `cache` (may be None)."""
        entry = self.find(cache)
        if cache is None or past == 0:
            if entry is not None:
                self._end(entry)
            entry = self._new(batch, 0)
        elif entry is None:
            entry = self._new(batch, past)
            entry.lost = f"the cache already held {past} tokens when it was first seen"
        elif entry.lost is None and len(entry.requests) != batch:
            entry.lost = "the batch size changed while the cache was in use"
        elif entry.lost is None and entry.slots != past:
            entry.lost = f"the cache held {entry.slots} tokens and now {past}"
        if cache is not None:
            self.bind(cache, entry)
        return entry

    def find(self, cache: Any) -> CacheEntry | None:
        """The entry bound to a cache."""
        held = self._entries.get(id(cache))
        return held[1] if held is not None and held[0]() is cache else None

    def bind(self, cache: Any, entry: CacheEntry) -> None:
        """Let the requests of `entry` go on with `cache`."""
        if self.find(cache) is entry:
            return
        key = id(cache)

        def gone(reference: weakref.ref[Any]) -> None:
            held = self._entries.get(key)
            if held is not None and held[0] is reference:
                del self._entries[key]
                self._end(held[1])

        self._entries[key] = (weakref.ref(cache, gone), entry)

    def drop(self, entry: CacheEntry) -> None:
        """End the requests of a step that had no cache."""
        if entry.recorded:
            self.ended.append(Ended(entry.recorded, None))

    def _end(self, entry: CacheEntry) -> None:
        if entry.recorded:
            self.ended.append(Ended(entry.recorded, time.time_ns()))

    def _new(self, batch: int, slots: int) -> CacheEntry:
        requests = [RequestState(next(self._numbers)) for _ in range(batch)]
        return CacheEntry(requests, slots, np.ones((batch, slots), bool))
