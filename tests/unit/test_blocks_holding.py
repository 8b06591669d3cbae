"""Blocks that must stay: no policy evicts one, ours or a user's, and nothing goes uncounted."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.reference import block_caches as naive
from tests.support.blocks import stream_of

from kvtrace.errors import InputError
from kvtrace_viewer.blocks import (
    POLICIES,
    Accounting,
    BlockPolicy,
    BlockStream,
    StepPolicy,
    parse_block_policy,
    replay_blocks,
    replay_curves,
)
from kvtrace_viewer.blocks.chain import push_head, unlink
from kvtrace_viewer.blocks.guard import FOREVER, Guard, hold, last_free, new_guard, refuse
from kvtrace_viewer.blocks.holding import Holding, holding_of
from kvtrace_viewer.blocks.policies.lru import LRU
from kvtrace_viewer.blocks.policy import HIT, MISS, REFUSED, UNREAD, Hits
from kvtrace_viewer.blocks.stream import Ids


@dataclass(frozen=True, kw_only=True)
class MRU(StepPolicy):
    """Evict the block that was used last: of all the most likely one to be held."""

    name = "mru"

    def start(self, capacity: int) -> Any:
        return OrderedDict()

    def hit(self, state: Any, block: int) -> None:
        state.move_to_end(block)

    def insert(self, state: Any, block: int) -> None:
        state[block] = None

    def evict(self, state: Any) -> int:
        victim: int = state.popitem()[0]
        return victim


class Own(BlockPolicy):
    """A kernel of one's own that takes a guard."""

    name = "own"

    def simulate(
        self, blocks: Ids, num_blocks: int, capacity: int, hits: Hits, guard: Guard | None = None
    ) -> int:
        return LRU().simulate(blocks, num_blocks, capacity, hits, guard)


class Old(BlockPolicy):
    """One that takes none."""

    name = "old"

    def simulate(self, blocks: Ids, num_blocks: int, capacity: int, hits: Hits) -> int:  # type: ignore[override]
        return 0


#: Large enough shares that all parts of a small cache are used.
SPECS = {"wtinylfu": "wtinylfu:window=0.5", "lirs": "lirs:queue=0.3", "s3fifo": "s3fifo:small=0.4"}
CACHES: list[BlockPolicy] = [
    *(parse_block_policy(SPECS.get(name, name)) for name in POLICIES),
    parse_block_policy("pinned_prefix:prefix=2,hard=true"),
    parse_block_policy("sliding_window:window=2"),
    parse_block_policy("slru:segments=2"),
    MRU(),
    Own(),
]
KEYS: dict[str, Callable[[BlockStream], Callable[[list[int]], object]]] = {
    "lru": lambda stream: lambda uses: uses[-1],
    "fifo": lambda stream: lambda uses: uses[0],
    "lfu": lambda stream: lambda uses: (len(uses), uses[-1]),
    "lru_k": lambda stream: lambda uses: (0, uses[-1]) if len(uses) < 2 else (1, uses[-2]),
    "length_aware": lambda stream: lambda uses: (len(uses), -int(stream.index[uses[-1]]), uses[-1]),
    "belady": lambda stream: lambda uses: -int(stream.next_access[uses[-1]]),
}


def served(blocks: list[int], length: int, lasts: list[int], pin: int, how: int | str) -> Holding:
    """What must stay in a stream whose requests last for so many others."""
    stream = stream_of(blocks, length)
    ends = [r + lasts[r % len(lasts)] for r in range(stream.requests)]
    stream = replace(stream, end_ns=np.array(ends, np.int64))
    found = holding_of(stream, pin, how)
    return found or Holding(0, 0, np.arange(1, stream.accesses + 1), np.empty(0, np.int64), 0, 1)


cases = st.tuples(
    st.lists(st.integers(0, 14), min_size=1, max_size=120),
    st.integers(1, 6),
    st.lists(st.integers(0, 5), min_size=1, max_size=9),
    st.integers(0, 2),
    st.sampled_from([0, 2, "service"]),
)


@settings(max_examples=40, deadline=None)
@given(case=cases, capacity=st.integers(2, 16))
def test_what_must_stay_is_never_evicted(case: Any, capacity: int) -> None:
    stream = stream_of(case[0], case[1])
    holding = served(*case)
    guard = new_guard(holding.until, stream.num_blocks, holding.ends)
    for policy in CACHES:
        until = holding.until
        if getattr(policy, "hard", False):
            until = np.where(stream.index < 2, FOREVER, until)
        if policy.name == "vllm":
            # What finds no room waits for the oldest request, and so it may go when that ended.
            until = np.where(until == FOREVER, FOREVER, np.arange(1, stream.accesses + 1))
        hits = policy.run(stream, capacity, new_guard(*guard[:1], stream.num_blocks, guard.ends))
        check(policy, stream, capacity, hits.hits.tolist(), until.tolist())
        if policy.name not in ("vllm", "recent_n"):
            came = int(np.count_nonzero(hits.hits == MISS))
            assert 0 <= came - hits.evictions <= capacity, policy


def check(
    policy: BlockPolicy, stream: BlockStream, capacity: int, hits: list[int], until: list[int]
) -> None:
    """What came in, and must stay until later, is still there; refused is only where all must."""
    stays: dict[int, int] = {}
    here: set[int] = set()
    whole = True
    stops = set(stream.starts.tolist())
    lengths = np.repeat(np.diff(stream.starts), np.diff(stream.starts)).tolist()
    for i, block in enumerate(stream.blocks.tolist()):
        # What might go may have gone.
        here = {one for one in here if stays[one] > i}
        whole = i in stops or (whole and hits[i - 1] == HIT)
        # vLLM looks up a prefix, and never the whole prompt.
        asked = hits[i] != UNREAD
        if policy.name == "vllm":
            asked = whole and i + 1 not in stops and hits[i] != REFUSED
        if asked and block in here:
            assert hits[i] == HIT, (policy, i)
        stays[block] = max(stays.get(block, 0), until[i])
        if hits[i] == REFUSED:
            if policy.name != "vllm":
                assert len(here - {block}) == capacity, (policy, i)
        elif hits[i] != UNREAD and (policy.name != "vllm" or lengths[i] <= capacity):
            # A request that is larger than vLLM's pool never runs.
            here.add(block)


@settings(max_examples=40, deadline=None)
@given(case=cases, capacity=st.integers(1, 16))
def test_of_what_may_go_the_first_in_the_policys_order_goes(case: Any, capacity: int) -> None:
    stream = stream_of(case[0], case[1])
    holding = served(*case)
    for name, key in KEYS.items():
        twin = naive.Holding(capacity, key(stream), holding.until.tolist())
        codes = {True: HIT, False: MISS, None: REFUSED}
        expected = [codes[twin.serve(block)] for block in stream.blocks.tolist()]
        guard = new_guard(holding.until, stream.num_blocks)
        found = POLICIES[name]().run(stream, capacity, guard)
        assert found.hits.tolist() == expected, name
        assert found.evictions == twin.evictions, name


@settings(max_examples=40, deadline=None)
@given(
    blocks=st.lists(st.integers(0, 25), min_size=1, max_size=150),
    length=st.integers(1, 7),
    capacity=st.integers(1, 30),
)
def test_where_nothing_must_stay_a_policy_does_what_it_did(
    blocks: list[int], length: int, capacity: int
) -> None:
    stream = stream_of(blocks, length)
    for policy in CACHES:
        before = policy.run(stream, capacity)
        guard = new_guard(np.arange(stream.accesses), stream.num_blocks)
        found = policy.run(stream, capacity, guard)
        assert np.array_equal(found.hits, before.hits), policy
        assert found.evictions == before.evictions, policy


@settings(max_examples=40, deadline=None)
@given(
    blocks=st.lists(st.integers(0, 25), min_size=1, max_size=150),
    length=st.integers(1, 7),
    capacity=st.integers(7, 30),
    held=st.integers(1, 4),
)
def test_holding_requests_is_what_vllm_does_with_them_in_flight(
    blocks: list[int], length: int, capacity: int, held: int
) -> None:
    stream = stream_of(blocks, length)
    one, other = (
        replay_blocks(stream, [f"vllm:in_flight={n}"], [capacity], hold=hold)[0]
        for n, hold in ((held, 0), (1, held))
    )
    assert (one.hits, one.evictions) == (other.hits, other.evictions)


def test_requests_hold_their_blocks_from_begin_to_end() -> None:
    # Requests 0 1, 2 3, 4 5, 0 1; the first ends when the third comes, or after the fourth.
    stream = stream_of([0, 1, 2, 3, 4, 5, 0, 1], length=2)
    early = replace(stream, end_ns=np.array([2, 1, 3, 4]))
    late = replace(stream, end_ns=np.array([9, 2, 3, 4]))
    for policy in ("lru", "fifo", "sieve", "belady"):
        (found,) = replay_blocks(late, [policy], [4], hold="service")
        assert (found.hits, found.evictions) == (2, 2), policy
    (found,) = replay_blocks(early, ["lru"], [4], hold="service")
    assert (found.hits, found.evictions) == (0, 4)
    # The third finds room for nothing while both others run.
    both = replace(stream, end_ns=np.array([9, 9, 3, 4]))
    (found,) = replay_blocks(both, ["lru"], [4], hold="service")
    assert found.to_json()["held"] == {"pin": 0, "hold": "service", "most": 6, "not_admitted": 2}
    assert found.hits == 2
    assert found.parameters == {"hold": "service"}
    assert any("2 accesses were misses that did not come in at 4" in note for note in found.notes)


def test_pinned_blocks_stay_for_good_under_vllm_too() -> None:
    stream = stream_of([0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 10], length=3)
    (found,) = replay_blocks(stream, ["vllm"], [5])
    assert found.hits == 0
    # The firsts of prompts, 0, 3 and 6, stay: three fill what the last one leaves to others.
    (found,) = replay_blocks(stream, ["vllm"], [5], pin=1)
    assert (found.hits, found.held and found.held.not_admitted) == (1, 0)
    # In four blocks two are left when the third comes, which never runs; the last finds its 0.
    (found,) = replay_blocks(stream, ["vllm"], [4], pin=1)
    assert (found.hits, found.held and found.held.not_admitted) == (1, 3)
    assert any("1 requests find no room in 4 blocks" in note for note in found.notes)


def test_what_did_not_come_in_is_a_miss() -> None:
    stream = stream_of([0, 1, 2, 1, 0, 1], length=3)
    (found,) = replay_blocks(stream, ["lru"], [1], Accounting(hits="prefix"), pin=1)
    # 0 and 1 are the first of a prompt: 0 fills the cache, and all others are misses.
    assert (found.hits, found.accesses, found.evictions) == (0, 6, 0)
    assert found.held is not None
    assert found.held.not_admitted == 4
    # A curve runs lru too, its one pass knows nothing that must stay.
    (whole,) = replay_blocks(stream, ["lru"], [1], pin=1)
    (point,) = replay_curves(stream, ["lru"], [1], pin=1)
    assert point == whole
    assert whole.hits == 1


def test_pinned_blocks_are_passed_once() -> None:
    guard = new_guard(np.array([FOREVER, FOREVER, 9, 4, 5]), 5)
    links = naive_list(5)
    for i in range(5):
        hold(guard, i, i)
    # From the tail: 0 1 2 3 4; pinned, pinned, held, free, free.
    assert last_free(links, 5, guard, 4) == 3
    assert order(links) == [2, 3, 4]
    unlink(links, 0)
    push_head(links, 5, 0)
    assert order(links) == [2, 3, 4, 0]
    assert last_free(links, 5, guard, 1) == 5
    refuse(guard, 1)
    assert guard.full.tolist() == [4]


def naive_list(count: int) -> Ids:
    """Nodes 0 to count - 1, the first at the tail."""
    links = np.empty((count + 1, 2), np.int32)
    links[:, 0] = np.roll(np.arange(count + 1), -1)
    links[:, 1] = np.roll(np.arange(count + 1), 1)
    return links


def order(links: Ids) -> list[int]:
    end = len(links) - 1
    found, node = [], int(links[end, 0])
    while node != end:
        found.append(node)
        node = int(links[node, 0])
    return found


def test_what_cannot_be_held_is_refused() -> None:
    stream = stream_of([0, 1, 2])
    with pytest.raises(InputError, match="old cannot run where blocks must stay: its run or"):
        replay_blocks(stream, ["lru", Old()], [2], pin=1)
    with pytest.raises(InputError, match="pin -1 is no number"):
        replay_blocks(stream, ["lru"], [2], pin=-1)
    with pytest.raises(InputError, match="hold -2 is no number"):
        replay_blocks(stream, ["lru"], [2], hold=-2)
    with pytest.raises(InputError, match="hold 'all' is unknown"):
        replay_blocks(stream, ["lru"], [2], hold="all")
    with pytest.raises(InputError, match="come with the time of their arrival alone"):
        replay_blocks(stream, ["lru"], [2], hold="service")
    with pytest.raises(InputError, match="lru with blocks that must stay cannot be run on"):
        replay_curves(stream, ["lru"], [2], sample=0.5, pin=1)
    assert "held" not in replay_blocks(stream, ["lru"], [2])[0].to_json()
