"""Which requests a step's batch rows belong to: caches are told apart by identity."""

from __future__ import annotations

import contextlib
import itertools
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvtrace_recorder.messages import CacheChange, Dormant, Ended, ForkedRequest
from kvtrace_recorder.session.api_request import api_request

if TYPE_CHECKING:
    from kvtrace_recorder.session.decode import DecodeRun
    from kvtrace_recorder.session.encoders import EncoderRun

Bools = NDArray[np.bool_]


@dataclass
class RequestState:
    """One sequence as it stands after its last recorded step.

    Attributes
    ----------
    request : int
        Its number.
    tokens : int
        Tokens in the cache, padding not counted.
    prompt_tokens : int
        Those of its prompt.
    last_token : int or None
        The last one's id; None where unknown.
    is_known : bool
        Whether the trace has the request.
    encoder : int or None
        The request that its cross attention reads.
    fork : (int, int) or None
        The request and its number of tokens that this one has become since its last row.
    lost : str or None
        Why no further rows of it can be recorded.
    external_id : str or None
        The id that whoever asked for it knows it by.
    """

    request: int
    tokens: int = 0
    prompt_tokens: int = 0
    last_token: int | None = None
    is_known: bool = False
    encoder: int | None = None
    fork: tuple[int, int] | None = None
    lost: str | None = None
    external_id: str | None = None

    @property
    def origin(self) -> tuple[int, int]:
        """The request, as far as the trace has it, and its number of tokens that this one is."""
        return self.fork or (self.request, self.tokens)

    def keep(self, tokens: int) -> None:
        """Cut the request to its first `tokens` tokens."""
        if tokens < self.tokens:
            self.fork = (self.origin[0], tokens)
            self.tokens, self.last_token = tokens, None

    def become(self, other: RequestState) -> RequestState:
        """The same request, going on from what `other` holds."""
        return replace(other, request=self.request, is_known=self.is_known, fork=other.origin)


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
        Of each layer, by its number, after the last step.
    numbers : mapping of int to int
        Layer numbers by index in the cache, where they differ.
    encoder : EncoderRun or None
        What their cross attention reads.
    run : DecodeRun or None
        Its plain decode steps, while there is nothing but such; `sizes` is behind meanwhile.
    """

    requests: list[RequestState]
    slots: int
    real: Bools
    lost: str | None = None
    steps: int = 0
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    run: DecodeRun | None = None
    numbers: Mapping[int, int] = field(default_factory=dict)
    encoder: EncoderRun | None = None

    def settle(self) -> None:
        """End the run of plain decode steps, where there is one: what follows is looked at anew."""
        if self.run is not None:
            self.run.end()

    def lose(self, reason: str) -> None:
        """Nothing further of these requests can be recorded."""
        self.lost = self.lost or reason
        for state in self.requests:
            state.lost = state.lost or reason

    @property
    def reason(self) -> str | None:
        """Why no further rows can be recorded of these requests, or of one of them."""
        return self.lost or next((state.lost for state in self.requests if state.lost), None)

    @property
    def recorded(self) -> tuple[int, ...]:
        """Requests with rows in the trace."""
        return tuple(state.request for state in self.requests if state.is_known)

    def crop(self, slots: int) -> None:
        """Keep only the first `slots` slots."""
        self.slots = slots
        self.real = self.real[:, :slots]
        for state, tokens in zip(self.requests, self.real.sum(axis=1), strict=True):
            state.keep(int(tokens))

    def forks(
        self, wanted: Callable[[RequestState], bool] = lambda _: True
    ) -> tuple[ForkedRequest, ...]:
        """What has become of the requests since their last step."""
        return tuple(
            ForkedRequest(state.request, *state.fork)
            for state in self.requests
            if state.fork is not None and self.lost is None and wanted(state)
        )

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
        self.ended: deque[CacheChange | Dormant | Ended] = deque()

    def entry_for(self, cache: Any, past: int, batch: int) -> CacheEntry:
        """The entry that a step belongs to, which holds `past` slots in `cache` (may be None)."""
        entry = self.find(cache)
        if entry is not None:
            entry.settle()
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

    def cache_with(self, layer: Any) -> Any:
        """The cache that a layer belongs to; None where no recorded request lives in it."""
        caches = (reference() for reference, _ in list(self._entries.values()))
        return next((c for c in caches if any(x is layer for x in getattr(c, "layers", ()))), None)

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

    def select(self, entry: CacheEntry, indices: NDArray[np.int64]) -> None:
        """Let each batch row i of a cache go on from what row `indices[i]` held.

        While the batch keeps its size a row keeps its request, as a beam does that changes its
        parent. Otherwise the first copy of a row takes its request along, further copies are new
        requests, and rows that nobody took have ended.
        """
        old = entry.requests
        if len(indices) == len(old):
            pairs = zip(old, indices, strict=True)
            new = [own if own is old[i] else own.become(old[i]) for own, i in pairs]
        else:
            new = []
            for at, i in enumerate(indices):
                first = i not in indices[:at]
                new.append(old[i] if first else RequestState(next(self._numbers)).become(old[i]))
            gone = tuple(s.request for n, s in enumerate(old) if s.is_known and n not in indices)
            if gone:
                self.ended.append(Ended(gone, time.time_ns()))
        entry.requests, entry.real = new, entry.real[indices]

    def close(self) -> None:
        """Say what the recording's end finds: caches that were cropped after their last step."""
        for _, entry in list(self._entries.values()):
            self._crop(entry)

    def _end(self, entry: CacheEntry) -> None:
        self._crop(entry)
        if entry.recorded:
            self.ended.append(Ended(entry.recorded, time.time_ns()))

    def _crop(self, entry: CacheEntry) -> None:
        # Rejected tokens do not stay. A reordering that no row followed is left out: nothing was
        # computed from it, and a beam search's last one picks beams that are of no use.
        forks = entry.forks(lambda state: state.origin[0] == state.request)
        if forks:
            self.ended.append(CacheChange(forks=forks))

    def take_ended(self) -> list[CacheChange | Dormant | Ended]:
        """What is to be said of requests that have ended; each once, whichever thread asks."""
        found: list[CacheChange | Dormant | Ended] = []
        with contextlib.suppress(IndexError):
            while self.ended:
                found.append(self.ended.popleft())
        return found

    def next_number(self) -> int:
        """Number of a request that has just come up."""
        return next(self._numbers)

    def _new(self, batch: int, slots: int) -> CacheEntry:
        name = api_request.get()
        requests = [RequestState(self.next_number(), external_id=name) for _ in range(batch)]
        return CacheEntry(requests, slots, np.ones((batch, slots), bool))
