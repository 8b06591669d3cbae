"""Pinned blocks: never evicted by any policy, in no more room than there is, nothing uncounted."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.blocks import stream_of

from kvtrace.errors import InputError
from kvtrace_viewer.blocks import POLICIES, BlockStream, replay_blocks, replay_curves
from kvtrace_viewer.blocks.pinned import run_pinned
from kvtrace_viewer.blocks.policy import HIT, MISS, UNREAD

PINNABLE = [name for name, kind in POLICIES.items() if kind.can_pin]
#: Refuses new blocks by its own rule.
TURNS_AWAY = {"wtinylfu"}
streams = st.builds(
    stream_of, st.lists(st.integers(0, 25), min_size=1, max_size=150), st.integers(1, 7)
)


def pinned_of(stream: BlockStream, first: int) -> list[int]:
    """Blocks that are pinned, in the order in which they first come."""
    begins = {int(stream.blocks[i]) for i in range(stream.accesses) if stream.index[i] < first}
    return [block for block in dict.fromkeys(stream.blocks.tolist()) if block in begins]


@settings(max_examples=60, deadline=None)
@given(stream=streams, capacity=st.integers(1, 30), first=st.integers(1, 3))
def test_no_policy_evicts_a_pinned_block(stream: BlockStream, capacity: int, first: int) -> None:
    pinned = set(pinned_of(stream, first)[:capacity])
    for name in PINNABLE:
        outcome, said = run_pinned(POLICIES[name](), stream, capacity, first)
        came: set[int] = set()
        for block, hit in zip(stream.blocks.tolist(), outcome.hits.tolist(), strict=True):
            if block in pinned and hit != UNREAD:
                assert hit == (HIT if block in came else MISS), name
            came.add(block)
        assert said.blocks == len(pinned)
        # What did not come in is counted: all that is not pinned where no place is left.
        others = sum(block not in pinned for block in stream.blocks.tolist())
        assert said.not_admitted == (others if len(pinned) == capacity else 0), name


@settings(max_examples=60, deadline=None)
@given(stream=streams, capacity=st.integers(1, 30), first=st.integers(1, 3))
def test_no_more_is_held_than_fits(stream: BlockStream, capacity: int, first: int) -> None:
    for name in PINNABLE:
        outcome, said = run_pinned(POLICIES[name](), stream, capacity, first)
        misses = int(np.count_nonzero(outcome.hits == MISS))
        # Every miss brings a block or is counted, but where a policy turns blocks away itself.
        if name not in TURNS_AWAY:
            assert misses - outcome.evictions - said.not_admitted <= capacity, name
        if said.blocks == capacity - 1:
            # One place for all others: only the one that came last can be there.
            pinned = set(pinned_of(stream, first))
            last = -1
            for block, hit in zip(stream.blocks.tolist(), outcome.hits.tolist(), strict=True):
                if block not in pinned:
                    assert hit != HIT or block == last, name
                    last = block


@settings(max_examples=60, deadline=None)
@given(stream=streams, capacity=st.integers(1, 30), first=st.integers(1, 3))
def test_lru_beside_pinned_blocks_is_its_naive_twin(
    stream: BlockStream, capacity: int, first: int
) -> None:
    kept = pinned_of(stream, first)[:capacity]
    room = capacity - len(kept)
    came: set[int] = set()
    cache: OrderedDict[int, None] = OrderedDict()
    expected, evictions = [], 0
    for block in stream.blocks.tolist():
        expected.append(block in came if block in kept else block in cache)
        if block in kept:
            came.add(block)
        elif room:
            if block not in cache and len(cache) == room:
                cache.popitem(last=False)
                evictions += 1
            cache[block] = None
            cache.move_to_end(block)
    outcome, _ = run_pinned(POLICIES["lru"](), stream, capacity, first)
    assert outcome.hits.tolist() == expected
    assert outcome.evictions == evictions


@settings(max_examples=30, deadline=None)
@given(stream=streams, capacity=st.integers(1, 30))
def test_with_nothing_to_pin_a_policy_does_what_it_did(stream: BlockStream, capacity: int) -> None:
    for name in PINNABLE:
        before = POLICIES[name]().run(stream, capacity)
        outcome, said = run_pinned(POLICIES[name](), stream, capacity, 0)
        assert np.array_equal(outcome.hits, before.hits), name
        assert (outcome.evictions, said.blocks) == (before.evictions, 0), name


def test_the_others_keep_their_places_in_their_requests() -> None:
    # Requests of a pinned block and others; priority protects the first two of each, 0 and 1.
    stream = stream_of([0, 1, 2, 0, 3, 4, 0, 1, 2], length=3)
    rest = stream.only(stream.blocks != 0)
    assert rest.index.tolist() == [1, 2, 1, 2, 1, 2]
    assert rest.starts.tolist() == [0, 2, 4, 6]
    assert rest.full_blocks() is rest


def test_results_say_what_was_pinned() -> None:
    stream = stream_of([0, 1, 2, 3, 0, 4, 5, 6, 0, 1], length=4)
    plain, *_ = replay_blocks(stream, ["lru"], [2])
    assert "pinned" not in plain.to_json()
    assert "pin" not in plain.parameters
    (found,) = replay_blocks(stream, ["lru"], [2], pin=1)
    assert found.to_json()["pinned"] == {"first": 1, "blocks": 1, "not_admitted": 0}
    assert found.parameters == {"pin": 1}
    # A curve runs lru too, its one pass knows no pins.
    (point,) = replay_curves(stream, ["lru"], [2], pin=1)
    assert point == found
    (full,) = replay_blocks(stream, ["lru"], [1], pin=1)
    assert full.hits == 2
    assert full.pinned is not None
    assert full.pinned.not_admitted == 7
    assert any("7 accesses of others found no room" in note for note in full.notes)


def test_what_cannot_be_pinned_is_refused() -> None:
    stream = stream_of([0, 1, 2])
    with pytest.raises(InputError, match="vllm cannot run with pinned blocks"):
        replay_blocks(stream, ["lru", "vllm"], [2], pin=1)
    with pytest.raises(InputError, match="pin -1 is no number"):
        replay_blocks(stream, ["lru"], [2], pin=-1)
    with pytest.raises(InputError, match="lru with pinned blocks cannot be run on a sample"):
        replay_curves(stream, ["lru"], [2], sample=0.5, pin=1)
