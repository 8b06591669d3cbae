"""What happens to the blocks of a paged cache, as rows of `kv_events`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kvtrace_recorder.messages import CacheEvent
from kvtrace_recorder.session.paged_requests import WARMUP, PagedRequest, PagedRequests

#: Where offloaded blocks lie; `str(device)` of the cache itself may be "cpu" too.
SWAP = "cpu swap"


class PagedCacheState:
    """The requests of one paged cache, and its events that are not written yet.

    Parameters
    ----------
    number, rest, release : callable
        See `PagedRequests`.
    """

    def __init__(
        self,
        number: Callable[[], int],
        rest: Callable[[int], None],
        release: Callable[[int], None],
    ) -> None:
        self.requests = PagedRequests(number, rest, release)
        #: Whether its model is recorded; None until that is known.
        self.wanted: bool | None = None
        self._events: list[CacheEvent] = []
        self._met: set[int] = set()
        #: When the scheduler was given each request that has not ended, by the manager's id.
        self.arrivals: dict[str, int] = {}
        #: Whether the trace says what the pool was set to.
        self.is_described = False

    def take_events(self) -> list[CacheEvent]:
        """Events since the last call."""
        events, self._events = self._events, []
        return events

    def arrived(self, name: str) -> None:
        """The scheduler was given a request; one that it gave up once has come before."""
        if not name.startswith(WARMUP):
            self.arrivals.setdefault(name, time.time_ns())

    def meet(self, allocator: Any) -> None:
        """See an allocator, which may have handed out blocks before the recording began."""
        if allocator.index in self._met:
            return
        self._met.add(allocator.index)
        for name, blocks in allocator.block_table.items():
            self.moved(allocator, name, [], blocks, "allocate")

    def moved(
        self,
        allocator: Any,
        name: str,
        before: Sequence[int],
        after: Sequence[int],
        joined: str | Callable[[int], str],
        held: Callable[[int], bool] = lambda block: False,
    ) -> None:
        """The block table of a request has changed.

        Parameters
        ----------
        allocator : CacheAllocator
            Of the layers concerned.
        name : str
            The request's id.
        before, after : sequence of int
            Its blocks.
        joined : str or callable
            The event of a block that came.
        held : callable
            Whether a block that went still holds its tokens.
        """
        if name.startswith(WARMUP):
            return
        request = self.requests.get(name)
        for index in range(max(len(before), len(after))):
            old = before[index] if index < len(before) else None
            new = after[index] if index < len(after) else None
            if old == new:
                continue
            if old is not None:
                self.block(allocator, request, old, index, "free", held=held(old))
            if new is not None:
                event = joined if isinstance(joined, str) else joined(new)
                self.block(allocator, request, new, index, event)

    def block(
        self,
        allocator: Any,
        request: PagedRequest | None,
        block: int | None,
        index: int | None,
        event: str,
        *,
        held: bool = True,
        device: str | None = None,
    ) -> None:
        """Note an event of one block; `held`: it holds its tokens after it."""
        if self.wanted is False:
            return
        self._events.append(
            CacheEvent(
                time.time_ns(),
                None,
                event,
                allocator.tokens_per_page if held else 0,
                allocator.bytes_per_block if held else 0,
                str(allocator.cache_tensor.device) if device is None else device,
                None if request is None else request.request,
                block,
                allocator.index if allocator.pool.num_allocators > 1 else None,
                index,
            )
        )

    def reset(self, request: PagedRequest | None, device: str) -> None:
        """A request's tokens, or the whole pool's, will have to be computed anew."""
        if self.wanted is False:
            return
        number = None if request is None else request.request
        self._events.append(CacheEvent(time.time_ns(), None, "reset", 0, 0, device, number))

    def share(self, allocator: Any, name: str) -> None:
        """A request was given the cached blocks of another's prefix."""
        blocks = allocator.block_table[name]
        if blocks and not name.startswith(WARMUP):
            source = self.requests.owners.get((allocator.index, blocks[-1]))
            tokens = len(blocks) * allocator.tokens_per_page
            self.requests.begin_with(self.requests.get(name), source, tokens)

    def completed(self, allocator: Any, name: str) -> None:
        """Full blocks of a request may now be shared."""
        request = self.requests.get(name)
        for block in allocator.block_table[name]:
            if block in allocator.ledger.block_to_hash:
                self.requests.own(allocator.index, block, request)

    def forget(self, allocator: Any, blocks: Iterable[int]) -> None:
        """Blocks that nothing refers to any more, unless their contents are still cached."""
        for block in blocks:
            if block not in allocator.ledger.block_to_hash:
                self.requests.disown(allocator.index, block)
