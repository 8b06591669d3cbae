"""What happens in continuous batching: its batches, and every block that its caches hand out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from kvtrace_recorder.session.paged_cache import PagedCacheState
from kvtrace_recorder.session.session import Session
from kvtrace_recorder.session.versions import library_versions
from kvtrace_recorder.taps import paged_offload
from kvtrace_recorder.taps.patch import Patch

NAME = "paged cache"
#: Given the session and the arguments, looks at what is before the call and returns what looks
#: after it, given the result.
Look = Callable[..., Callable[[Any], None]]


def patches(session: Session) -> list[Patch]:
    """The patches of this tap: methods of transformers' batch processor, caches and allocators.

    None where this version of transformers has others: without all of them rows could be wrong.
    """
    try:
        looks = _looks()
        missing = [f"{kind.__name__}.{name}" for kind, name, _ in looks if not hasattr(kind, name)]
    except ImportError as error:
        looks, missing = [], [str(error.name)]
    if missing:
        version = library_versions().get("transformers")
        session.batches.unseen = (
            f"transformers {version} has no {missing[0]}, so its continuous batching is not"
            " recorded; record with transformers 5.23"
        )
        return []
    return [Patch(owner, name, _maker(session, look)) for owner, name, look in looks]


def _looks() -> list[tuple[type, str, Look]]:
    from transformers.generation.continuous_batching.cache import PagedAttentionCache
    from transformers.generation.continuous_batching.cache_allocators import CacheAllocator
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor
    from transformers.generation.continuous_batching.offloading_manager import OffloadingManager
    from transformers.generation.continuous_batching.scheduler import Scheduler

    looks: list[tuple[type, str, Look]] = [
        (PagedAttentionCache, "update", _update),
        (PagedAttentionCache, "evict_cached_blocks", _evict),
        (PagedAttentionCache, "reset", _reset),
        (Scheduler, "add_waiting_request", _arrive),
        (OffloadingManager, "_offload_to_cpu", paged_offload.offload),
        (OffloadingManager, "restore_scheduled_requests", paged_offload.restore),
        (OffloadingManager, "free_request_cpu_cache", paged_offload.free),
        (ContinuousBatchProcessor, "_generation_step", _batch),
        (ContinuousBatchProcessor, "update_batch", _settle),
        (ContinuousBatchProcessor, "prepare_next_batch", _settle_idle),
    ]
    of_allocators = {**_allocator_looks, "fork_blocks": _fork}
    for kind in _family(CacheAllocator):
        looks += [(kind, name, look) for name, look in of_allocators.items() if name in vars(kind)]
    return looks


def _family(kind: type[Any]) -> Iterator[type[Any]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _family(child)


def _maker(session: Session, look: Look) -> Any:
    def make(original: Any) -> Any:
        @functools.wraps(original)
        def observed(*args: Any, **kwargs: Any) -> Any:
            after = session.guard.run(NAME, look, session, *args, **kwargs)
            try:
                result = original(*args, **kwargs)
            except BaseException:
                # What the call did before it raised is seen too.
                if after is not None:
                    session.guard.run(NAME, after, None)
                raise
            if after is not None:
                session.guard.run(NAME, after, result)
            return result

        return observed

    return make


def _blocks(allocator: Any, request_id: str) -> list[int]:
    return list(allocator.block_table.get(request_id, ()))


def _met(session: Session, allocator: Any) -> PagedCacheState:
    """What is known of an allocator's cache, the blocks that it has handed out before included."""
    state = session.batches.cache(allocator.pool)
    state.meet(allocator)
    return state


def _moves(
    joined: str,
    then: Callable[[PagedCacheState, Any, str, list[int]], None] | None = None,
    held: Callable[[Any, int], bool] = lambda allocator, block: False,
) -> Look:
    """A look at a method of an allocator that changes the block table of one request.

    Parameters
    ----------
    joined : str
        The event of a block that came.
    then : callable, optional
        What else follows: given the cache, the allocator, the request's id and its old blocks.
    held : callable
        Whether a block that went still holds its tokens, though no request shared it.
    """

    def look(
        session: Session, allocator: Any, request_id: str, *args: Any, **kwargs: Any
    ) -> Callable[[Any], None]:
        state = _met(session, allocator)
        before = _blocks(allocator, request_id)
        shared = set(allocator.ledger.shared_ref_counts)

        def after(result: Any) -> None:
            own = _blocks(allocator, request_id)
            state.moved(
                allocator,
                request_id,
                before,
                own,
                joined,
                lambda block: block in shared or held(allocator, block),
            )
            if then is not None:
                then(state, allocator, request_id, before)

        return after

    return look


#: A block whose contents are already cached gives way to the cached one when it is complete.
_allocator_looks: dict[str, Look] = {
    "allocate_cache_to_request": _moves("allocate"),
    "acquire_prefix_blocks": _moves(
        "share", lambda state, allocator, name, _: state.share(allocator, name)
    ),
    "mark_complete_blocks": _moves(
        "share", lambda state, allocator, name, _: state.completed(allocator, name)
    ),
    "free_blocks": _moves(
        "allocate",
        lambda state, allocator, _, before: state.forget(allocator, before),
        lambda allocator, block: block in allocator.ledger.cached_blocks,
    ),
}


def _fork(
    session: Session,
    allocator: Any,
    source_request_id: str,
    dest_request_id: str,
    past_length: int,
) -> Callable[[Any], None]:
    state = _met(session, allocator)
    kept = set(_blocks(allocator, source_request_id))

    def after(result: Any) -> None:
        blocks = _blocks(allocator, dest_request_id)
        state.moved(
            allocator,
            dest_request_id,
            [],
            blocks,
            lambda block: "share" if block in kept else "fork",
        )
        source = state.requests.get(source_request_id)
        state.requests.begin_with(state.requests.get(dest_request_id), source, past_length)

    return after


def _update(session: Session, cache: Any, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
    def after(result: Any) -> None:
        session.batches.keys_seen(session.current, result[0])

    return after


def _evict(session: Session, cache: Any) -> Callable[[Any], None]:
    state = session.batches.cache(cache.pool)
    before = [(a, list(a.ledger.cached_blocks)) for a in cache.cache_allocators.values()]
    for allocator, _ in before:
        state.meet(allocator)

    def after(result: Any) -> None:
        for allocator, blocks in before:
            for block in blocks:
                if block not in allocator.ledger.cached_blocks:
                    state.block(allocator, None, block, None, "evict", held=False)
            state.forget(allocator, blocks)

    return after


def _reset(session: Session, cache: Any) -> Callable[[Any], None]:
    state = session.batches.cache(cache.pool)

    def after(result: Any) -> None:
        for allocator in cache.cache_allocators.values():
            owned = [block for group, block in state.requests.owners if group == allocator.index]
            state.forget(allocator, owned)
        state.reset(None, str(cache.device))

    return after


def _arrive(session: Session, scheduler: Any, request: Any) -> Callable[[Any], None]:
    def after(result: Any) -> None:
        session.batches.cache(scheduler.cache.pool).arrived(request.request_id)

    return after


def _batch(session: Session, processor: Any, model: Any) -> Callable[[Any], None]:
    wanted = session.model_state(model) if session.wants(model) else None
    session.batches.enter_batch(processor, wanted)

    def after(result: Any) -> None:
        session.batches.leave_batch(processor, session.flush_held)

    return after


def _settle(session: Session, processor: Any) -> Callable[[Any], None]:
    def after(result: Any) -> None:
        session.batches.settle(processor)

    return after


def _settle_idle(session: Session, processor: Any) -> Callable[[Any], None]:
    def after(result: Any) -> None:
        # With a batch prepared, what happened belongs to its step.
        if not result:
            session.batches.settle(processor)

    return after
