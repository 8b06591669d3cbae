"""The keys of every running request, layer by layer: what a row's log-sum-exp is taken over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from kvtrace.sequences import Fork, Ids, Sequences
from kvtrace_recorder.lse import KeyHistory

#: Keys of requests that have ended, and that others may begin with, held at most; beyond that
#: they are read back from the trace when one does.
DORMANT_BYTES = 128 << 20
Parts = Mapping[int, NDArray[Any]]


class Histories:
    """Key histories by request and layer, which follow the requests' forks.

    Parameters
    ----------
    read : callable
        Given a request and rows of it, their keys from the trace by layer:
        [row, kv_head, head_dim].
    """

    def __init__(self, read: Callable[[int, Ids], Parts]) -> None:
        self._keys: dict[int, dict[int, KeyHistory]] = {}
        self._sequences = Sequences()
        self._read = read
        #: Bytes of the keys of dormant requests, the longest dormant first.
        self._dormant: dict[int, int] = {}

    def of(self, request: int, layer: int) -> KeyHistory:
        """The history of a request in a layer; empty where there was none."""
        return self._keys.setdefault(request, {}).setdefault(layer, KeyHistory())

    def forget(self, request: int, layer: int) -> None:
        """Forget the keys of one layer, which nothing further needs."""
        self._keys.get(request, {}).pop(layer, None)
        if not self._keys.get(request):
            self._keys.pop(request, None)

    def add_rows(self, request: int, rows: Ids) -> None:
        """Note which rows come next in a request; their keys are added layer by layer."""
        self._sequences.extend(request, rows)

    def rows(self, request: int) -> Ids:
        """The rows of a request, by position."""
        return self._sequences.rows(request)

    def fork(self, forks: Sequence[Fork]) -> None:
        """Apply the forks of one row: each finds its source as it stood before all of them."""
        # Beams share all but their last tokens: only what differs is copied.
        moved = []
        for fork in forks:
            shared = self._shared(fork)
            moved.append((fork, shared, self._parts(fork, shared)))
        for fork, shared, parts in moved:
            for layer, keys in parts.items():
                history = self.of(fork.request, layer)
                history.truncate(shared)
                history.extend(keys)
        self._sequences.fork(forks)

    def rest(self, request: int) -> None:
        """A request has ended, but others may begin with its tokens."""
        layers = self._keys.get(request, {})
        self._dormant[request] = sum(history.nbytes for history in layers.values())
        while sum(self._dormant.values()) > DORMANT_BYTES:
            oldest = next(iter(self._dormant))
            del self._dormant[oldest]
            self._keys.pop(oldest, None)

    def end(self, request: int) -> None:
        """Forget a request."""
        self._dormant.pop(request, None)
        self._keys.pop(request, None)
        self._sequences.drop(request)

    def _shared(self, fork: Fork) -> int:
        """Leading tokens that a request and its new parent have in common."""
        own = self._sequences.rows(fork.request)
        other = self._sequences.rows(fork.source)[: fork.tokens]
        count = min(len(own), len(other))
        differs = own[:count] != other[:count]
        return int(differs.argmax()) if differs.any() else count

    def _parts(self, fork: Fork, start: int) -> Parts:
        histories = self._keys.get(fork.source)
        if histories is not None:
            return {n: history.part(start, fork.tokens) for n, history in histories.items()}
        rows = self._sequences.rows(fork.source)[start : fork.tokens]
        return self._read(fork.source, rows) if len(rows) else {}
