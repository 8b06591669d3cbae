"""The requests that live in one paged cache of continuous batching."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kvtrace_recorder.messages import ForkedRequest
from kvtrace_recorder.session.requests import RequestState

#: Requests that a manager makes up to warm its kernels up; see `create_warmup_future_states`.
WARMUP = "__warmup_"


@dataclass
class PagedRequest(RequestState):
    """A request of a continuous batch; its `external_id` is the manager's own id of it.

    Attributes
    ----------
    ended : bool
        Whether the manager is done with it.
    prefix : (PagedRequest, int) or None
        The request whose first so many tokens it begins with, until its own first step says so.
    holds : int
        Cached blocks that it computed, and requests that will begin with its tokens: while there
        are any, its keys are still wanted.
    """

    ended: bool = False
    prefix: tuple[PagedRequest, int] | None = None
    holds: int = 0


@dataclass
class PagedRequests:
    """Finds the requests of one cache by their ids, and says when their keys are done with.

    Parameters
    ----------
    number : callable
        Gives the next request its number.
    rest : callable
        Told the number of a request that has ended, while others may begin with its tokens.
    release : callable
        Told the number of a request that has ended and that no other can begin with any more.
    """

    number: Callable[[], int]
    rest: Callable[[int], None]
    release: Callable[[int], None]
    live: dict[str, PagedRequest] = field(default_factory=dict)
    #: Who computed a cached block, by cache group and block.
    owners: dict[tuple[int, int], PagedRequest] = field(default_factory=dict)

    def get(self, external_id: str) -> PagedRequest:
        """The request of this id that has not ended; a new one where there is none."""
        found = self.live.get(external_id)
        if found is None:
            found = PagedRequest(self.number(), external_id=external_id)
            self.live[external_id] = found
        return found

    def own(self, group: int, block: int, request: PagedRequest) -> None:
        """A full block of `request` can be shared from now on."""
        if (group, block) not in self.owners:
            self.owners[group, block] = request
            request.holds += 1

    def disown(self, group: int, block: int) -> None:
        """A block cannot be shared any more."""
        owner = self.owners.pop((group, block), None)
        if owner is not None:
            self._unhold(owner)

    def begin_with(self, request: PagedRequest, source: PagedRequest | None, tokens: int) -> None:
        """`request` was given the cache of the first `tokens` tokens of `source`."""
        self._forget_prefix(request)
        if source is None:
            request.lost = "its prefix was computed before the recording began"
        elif source is not request:
            request.prefix = (source, tokens)
            source.holds += 1

    def departs(self, request: PagedRequest, past: int) -> bool:
        """Whether a step that follows `past` tokens of a request does not follow its last row."""
        return request.prefix is not None or past != request.tokens

    def resume(self, request: PagedRequest, past: int) -> ForkedRequest | None:
        """A step goes on after `past` tokens of a request; how the trace is to follow, if at all.

        Sets `request.lost` where the trace has no such tokens.
        """
        if request.lost is not None:
            return None
        prefix, source = request.prefix, request
        if prefix is not None and request.tokens < past <= prefix[1]:
            source = prefix[0]
        self._forget_prefix(request)
        if past == request.tokens and source is request:
            return None
        if source.lost is not None or source.tokens < past:
            request.lost = source.lost or f"{past} of its tokens came from where nothing was seen"
            return None
        request.tokens = past
        return ForkedRequest(request.request, source.request, past)

    def end(self, request: PagedRequest) -> None:
        """The manager is done with a request."""
        self.live.pop(str(request.external_id), None)
        self._forget_prefix(request)
        request.ended = True
        if request.holds and request.is_known:
            self.rest(request.request)
        self._unhold(request, 0)

    def end_all(self) -> None:
        """The cache is gone."""
        for key in list(self.owners):
            self.disown(*key)
        for request in list(self.live.values()):
            self.end(request)

    def _forget_prefix(self, request: PagedRequest) -> None:
        if request.prefix is not None:
            source, request.prefix = request.prefix[0], None
            self._unhold(source)

    def _unhold(self, request: PagedRequest, count: int = 1) -> None:
        request.holds -= count
        if request.ended and request.holds == 0 and request.is_known:
            self.release(request.request)
