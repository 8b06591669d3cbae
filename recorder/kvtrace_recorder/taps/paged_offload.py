"""Blocks of a paged cache that move to the swap pool and back; see the paged cache tap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvtrace_recorder.session.paged_cache import SWAP
from kvtrace_recorder.session.session import Session


def offload(
    session: Session, manager: Any, victims: Any, victim_block_tables: Any
) -> Callable[[Any], None]:
    """Requests give up their blocks: some are copied to the swap pool, the others are reset."""
    state = session.batches.cache(manager.cache.pool)

    def after(result: Any) -> None:
        for victim in victims:
            request = state.requests.get(victim.request_id)
            if not result or victim.request_id not in result:
                # What transformers calls a soft reset.
                state.reset(request, str(manager.cache.device))
                continue
            swapped = manager._request_id_to_cpu_blocks[victim.request_id]
            for name, blocks in swapped.items():
                allocator = manager.cache.cache_allocators[name]
                for index, block in enumerate(blocks):
                    state.block(allocator, request, block, index, "offload", device=SWAP)

    return after


def restore(session: Session, manager: Any, requests_in_batch: Any) -> Callable[[Any], None]:
    """Requests have new blocks, and get what lies in the swap pool back into them."""
    state = session.batches.cache(manager.cache.pool)
    swapped = _swapped(manager, [future.state for future in requests_in_batch])

    def after(result: Any) -> None:
        for request_id, name, blocks in swapped:
            if request_id in manager._request_id_to_cpu_blocks:
                continue
            allocator = manager.cache.cache_allocators[name]
            request = state.requests.get(request_id)
            own = allocator.block_table.get(request_id, ())
            for index, block in enumerate(own[: len(blocks)]):
                state.block(allocator, request, block, index, "restore")
            for index, block in enumerate(blocks):
                state.block(allocator, request, block, index, "free", held=False, device=SWAP)

    return after


def free(session: Session, manager: Any, state: Any) -> Callable[[Any], None]:
    """A request will not go on, and gives up its blocks in the swap pool."""
    known = session.batches.cache(manager.cache.pool)
    swapped = _swapped(manager, [state])

    def after(result: Any) -> None:
        for request_id, name, blocks in swapped:
            if request_id in manager._request_id_to_cpu_blocks:
                continue
            allocator = manager.cache.cache_allocators[name]
            request = known.requests.get(request_id)
            for index, block in enumerate(blocks):
                known.block(allocator, request, block, index, "free", held=False, device=SWAP)

    return after


def _swapped(manager: Any, states: Any) -> list[tuple[str, str, list[int]]]:
    """Request, allocator and blocks of what these requests have in the swap pool."""
    tables = manager._request_id_to_cpu_blocks
    return [
        (state.request_id, name, list(blocks))
        for state in states
        for name, blocks in tables.get(state.request_id, {}).items()
    ]
