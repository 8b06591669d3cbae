"""Steps of continuous batching: many requests in one row of tokens, their keys in a paged cache."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from kvtrace_recorder.messages import (
    CacheChange,
    Dormant,
    Ended,
    ForkedRequest,
    Gap,
    PoolInfo,
    RowlessRequest,
    Sequenced,
    StepBatch,
    StepRecord,
)
from kvtrace_recorder.session.models import ModelState
from kvtrace_recorder.session.paged_cache import PagedCacheState
from kvtrace_recorder.session.paged_pool import describe
from kvtrace_recorder.session.paged_requests import PagedRequest
from kvtrace_recorder.session.requests import Bools, CacheEntry, RequestBook
from kvtrace_recorder.session.step import ActiveStep

if TYPE_CHECKING:
    from kvtrace_recorder.pipeline import Pipeline

NO_PYTHON = (
    "continuous batching ran a CUDA graph or compiled code, where no tap is called; record with"
    " ContinuousBatchingConfig(use_cuda_graph=False) and without compilation, or serve with"
    " --no-cb-use-cuda-graph"
)


class ContinuousBatches:
    """What a recording knows of the batches and paged caches of this process.

    Parameters
    ----------
    open_pipeline : callable
        Gives the pipeline that takes what happened to the caches.
    book : RequestBook
        Numbers the requests.
    """

    def __init__(self, open_pipeline: Callable[[], Pipeline], book: RequestBook) -> None:
        self._open_pipeline = open_pipeline
        self._book = book
        self._local = threading.local()
        self._lock = threading.RLock()
        self._caches: weakref.WeakKeyDictionary[Any, PagedCacheState] = weakref.WeakKeyDictionary()
        #: Why continuous batching cannot be recorded here; None where it can.
        self.unseen: str | None = None

    @property
    def _pipeline(self) -> Pipeline:
        return self._open_pipeline()

    def cache(self, pool: Any) -> PagedCacheState:
        """What is known of a cache, by its `CachePool`, which its allocators share."""
        with self._lock:
            found = self._caches.get(pool)
            if found is None:
                found = PagedCacheState(self._book.next_number, self._rest, self._release)
                self._caches[pool] = found
                weakref.finalize(pool, found.requests.end_all).atexit = False
            return found

    def enter_batch(self, processor: Any, model: ModelState | None) -> None:
        """A model is about to run a processor's batch in this thread; None: none to record."""
        state = self.cache(processor.cache.pool)
        state.wanted = model is not None
        if model is None:
            state.take_events()
        elif not state.is_described:
            state.is_described = True
            for columns in describe(processor):
                self._pipeline.put(PoolInfo(model.info.key, columns))
        io = processor.inputs_and_outputs
        pairs = getattr(io, "io_pairs", None)
        io = io if pairs is None else pairs[io.current_pair].host_io
        self._local.batch = list(io.requests_in_batch)
        self._local.model, self._local.ran = model, False
        self._local.started_ns = time.time_ns()

    def leave_batch(self, processor: Any, flush: Callable[[], None]) -> None:
        """The model has run it, or a CUDA graph did; `flush` as in `begin`."""
        batch, self._local.batch = self._local.batch, None
        model: ModelState | None = self._local.model
        if model is None or self._local.ran:
            return
        state = self.cache(processor.cache.pool)
        for future in batch:
            request, _ = _request(state, future)
            request.lost = request.lost or NO_PYTHON
            self._name(request, future)
        started = self._local.started_ns
        step = StepRecord(
            phase=_phase(batch),
            batch_size=len(batch),
            num_tokens=sum(future.query_length for future in batch),
            started_ns=started,
            duration_ns=time.time_ns() - started,
            events=state.take_events(),
            fault=NO_PYTHON,
        )
        flush()
        self._pipeline.put(StepBatch(model.info.key, [step]))

    def begin(
        self, model: ModelState, inputs: dict[str, Any], flush: Callable[[], None]
    ) -> ActiveStep | None:
        """The model is given a batch; None where it is none to record.

        `flush` has the steps before it sent, which may be refused: then no request can begin with
        their rows.
        """
        batch, ids = getattr(self._local, "batch", None), inputs["input_ids"]
        self._local.ran = True
        if batch is None or (ids.is_cuda and torch.cuda.is_current_stream_capturing()):
            # Kernels are warmed up, or a CUDA graph is made of what has just run.
            return None
        state = self.cache(inputs["cache"].pool)
        if any(state.requests.departs(*_request(state, future)) for future in batch):
            flush()
        members = self._members(state, batch, ids.shape[1])
        record = StepRecord(
            phase=_phase(batch),
            batch_size=len(batch),
            num_tokens=sum(future.query_length for future in batch),
            started_ns=time.time_ns(),
            forks=members.forks,
            sequences=members.sequences,
            token_ids=ids[0].cpu().numpy()[members.real].tolist(),
            events=state.take_events(),
        )
        real = members.real
        keep = None if real.all() else torch.as_tensor(np.flatnonzero(real))
        entry = CacheEntry(list(members.requests), 0, np.ones((1, len(real)), bool))
        step = ActiveStep(model, record, 1, len(real), 0, None, entry, real[None], keep)
        step.is_packed, step.spans = True, members.spans
        return step

    def keys_seen(self, step: ActiveStep | None, keys: torch.Tensor) -> None:
        """The cache has put the keys together that a layer of a step sees, old and new."""
        if step is not None and (step.keeps is None or step.keeps.sums):
            step.seen_keys = keys

    def settle(self, processor: Any) -> None:
        """A processor has updated its batch: end what has ended, and say what became free."""
        state = self.cache(processor.cache.pool)
        scheduler = processor.scheduler
        for name, request in list(state.requests.live.items()):
            if name not in scheduler.active_requests and name not in scheduler.waiting_requests:
                state.requests.end(request)
                state.arrivals.pop(name, None)
        self._flush(state)

    def finish(self) -> None:
        """The recording ends."""
        for state in list(self._caches.values()):
            self._flush(state)

    def _flush(self, state: PagedCacheState) -> None:
        events = state.take_events() if state.wanted else []
        if events:
            self._pipeline.put(CacheChange(tuple(events)))

    def _members(self, state: PagedCacheState, batch: Sequence[Any], length: int) -> _Members:
        found = _Members(np.zeros(length, bool))
        start = 0
        for future in batch:
            count = future.query_length
            request, past = _request(state, future)
            fork = state.requests.resume(request, past)
            if request.lost is None:
                arrived = state.arrivals.get(future.state.request_id)
                found.add(request, past, count, prompt_tokens(future.state), start, arrived)
                found.forks += [] if fork is None else [fork]
            else:
                self._name(request, future)
                self._pipeline.put(Gap("tokens", count, request.lost))
            found.spans.append((request.lost is None, past, count))
            start += count
        return found

    def _name(self, request: PagedRequest, future: Any) -> None:
        """Say who a request is that the trace will have no row of, but events."""
        if not request.is_known:
            request.is_known = True
            self._pipeline.put(
                RowlessRequest(
                    self._local.model.info.key,
                    request.request,
                    request.external_id,
                    prompt_tokens(future.state),
                    self._local.started_ns,
                )
            )

    def _rest(self, request: int) -> None:
        self._book.ended.append(Dormant((request,)))

    def _release(self, request: int) -> None:
        self._book.ended.append(Ended((request,), None))


@dataclass
class _Members:
    """The recorded requests of a batch, and which of its tokens are theirs rather than padding."""

    real: Bools
    requests: list[PagedRequest] = field(default_factory=list)
    sequences: list[Sequenced] = field(default_factory=list)
    forks: list[ForkedRequest] = field(default_factory=list)
    spans: list[tuple[bool, int, int]] = field(default_factory=list)

    def add(
        self,
        request: PagedRequest,
        past: int,
        count: int,
        prompt: int,
        start: int,
        arrived_ns: int | None,
    ) -> None:
        """Add a request whose tokens from `past` on stand in the batch from `start` on."""
        self.real[start : start + count] = True
        index, new = len(self.requests), not request.is_known
        self.requests.append(request)
        shared = min(count, max(0, prompt - past))
        self.sequences.append(
            Sequenced(
                request.request,
                index,
                past,
                count,
                new,
                prompt,
                request.external_id,
                shared,
                arrived_ns=arrived_ns,
            )
        )


def is_paged(inputs: dict[str, Any]) -> bool:
    """Whether a model is called by continuous batching."""
    return isinstance(inputs.get("cache"), PagedAttentionCache)


def _request(state: PagedCacheState, future: Any) -> tuple[PagedRequest, int]:
    """A request of a batch, and how many of its tokens are in the cache already."""
    past = future.state.position_offset - future.query_length
    return state.requests.get(future.state.request_id), past


def prompt_tokens(state: Any) -> int:
    """Tokens of a request's own prompt; after a soft reset its answer is asked again with it."""
    return int(state._true_initial_tokens or len(state.initial_tokens))


def _phase(batch: Sequence[Any]) -> str:
    decoding = [
        future.query_length == 1 and future.state.position_offset > prompt_tokens(future.state)
        for future in batch
    ]
    return "decode" if all(decoding) else "mixed" if any(decoding) else "prefill"
