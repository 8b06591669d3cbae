"""Block policies: an independent simulator's hit counts, naive twins, and what must always hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.reference import block_caches as naive
from tests.support.blocks import MOONCAKE, REFERENCE, imported, needs_mooncake, stream_of

import kvtrace_viewer.blocks.policies as shipped
from kvtrace_viewer.blocks import (
    POLICIES,
    Accounting,
    BlockStream,
    parse_block_policy,
    replay_blocks,
)
from kvtrace_viewer.blocks.policies.vllm import VLLM

OURS = {"Sieve": "sieve", "TwoQ": "two_q", "LRUK": "lru_k", "LengthAware": "length_aware"}
#: May be half a point of the hit ratio off; the others are equal to the integer.
NEAR = {"S3FIFO", "LIRS", "WTinyLFU"}

Make = Callable[[int, Sequence[int]], naive.Cache]
TWINS: dict[str, Make] = {
    "lru": lambda capacity, blocks: naive.LRU(capacity),
    "fifo": lambda capacity, blocks: naive.FIFO(capacity),
    "clock": lambda capacity, blocks: naive.Clock(capacity),
    "lfu": lambda capacity, blocks: naive.LFU(capacity),
    "sieve": lambda capacity, blocks: naive.Sieve(capacity),
    "s3fifo": lambda capacity, blocks: naive.S3FIFO(capacity),
    "arc": lambda capacity, blocks: naive.ARC(capacity),
    "two_q": lambda capacity, blocks: naive.TwoQ(capacity),
    "slru": lambda capacity, blocks: naive.SLRU(capacity),
    "lirs": lambda capacity, blocks: naive.LIRS(capacity),
    "lru_k": lambda capacity, blocks: naive.LRUK(capacity),
    "length_aware": lambda capacity, blocks: naive.LengthAware(
        capacity, [i % 5 for i in range(len(blocks))]
    ),
    "belady": naive.Belady,
}


def check(stream: BlockStream, reference: Path) -> None:
    rows = json.loads(reference.read_text())["rows"]
    ours = {name: OURS.get(name, name.lower()) for name in {row["policy"] for row in rows}}
    for row in rows:
        if ours[row["policy"]] not in POLICIES:
            continue
        (found,) = replay_blocks(stream, [ours[row["policy"]]], [row["capacity"]])
        room = 0.005 * row["requests"] if row["policy"] in NEAR else 0
        assert found.accesses == row["requests"]
        assert abs(found.hits - row["hits"]) <= room, (row, found.hits)


def test_hits_on_our_sessions_are_the_independent_simulators(tmp_path: Path) -> None:
    stream = imported(REFERENCE / "sessions_a.jsonl", tmp_path)
    check(stream, REFERENCE / "block_hits_sessions_a.json")


@needs_mooncake
def test_hits_on_mooncake_are_the_independent_simulators(tmp_path: Path) -> None:
    stream = imported(MOONCAKE, tmp_path)
    check(stream, REFERENCE / "block_hits.json")
    for capacity in (1000, 10_000, 30_000, 100_000):
        same = replay_blocks(stream, ["lfu", "sieve", "lru_k"], [capacity])
        # All three evict the oldest block that was used once.
        assert len({result.hits for result in same}) == 1
        (best,) = replay_blocks(stream, ["belady"], [capacity])
        for result in replay_blocks(stream, list(POLICIES), [capacity]):
            assert result.hits <= best.hits
    serial = {5859: 40_640, 10_000: 62_001, 30_000: 95_336}
    found = replay_blocks(stream, ["vllm"], list(serial), Accounting(blocks="full"))
    assert {result.capacity: result.hits for result in found} == serial


def test_every_policy_file_is_registered() -> None:
    files = {path.stem for path in Path(shipped.__path__[0]).glob("*.py")} - {"__init__"}
    assert files == {kind.__module__.rpartition(".")[2] for kind in POLICIES.values()}
    assert list(POLICIES) == [kind.name for kind in POLICIES.values()]


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.lists(st.integers(0, 12), min_size=1, max_size=120),
    capacity=st.integers(1, 14),
)
def test_every_policy_does_what_its_naive_twin_does(blocks: list[int], capacity: int) -> None:
    stream = stream_of(blocks)
    for name, make in TWINS.items():
        twin = make(capacity, stream.blocks.tolist())
        expected = [twin.access(block) for block in stream.blocks.tolist()]
        found = POLICIES[name]().run(stream, capacity)
        assert found.hits.astype(bool).tolist() == expected, name
        assert found.evictions == twin.evictions, name


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.lists(st.integers(0, 30), min_size=1, max_size=300),
    capacity=st.integers(1, 32),
)
def test_what_holds_for_every_policy(blocks: list[int], capacity: int) -> None:
    stream = stream_of(blocks)
    (best,) = replay_blocks(stream, ["belady"], [capacity])
    for result in replay_blocks(stream, list(POLICIES), [capacity]):
        assert result.hits <= best.hits, result.policy
        assert result.hits <= stream.accesses - stream.num_blocks, result.policy
        if result.policy in TWINS:
            # Every miss brings a block, and at most `capacity` of them are left.
            misses = result.accesses - result.hits
            assert misses - capacity <= result.evictions <= misses, result.policy


def vllm_of(
    tokens: Sequence[int], chains: Sequence[Sequence[int]], capacity: int, **how: int
) -> list[int]:
    """Hits by request, of prompts with so many tokens in blocks of 4."""
    found = [block for chain in chains for block in chain]
    starts = np.concatenate([[0], np.cumsum([len(chain) for chain in chains])])
    sizes = [
        min(4, n - 4 * i)
        for n, chain in zip(tokens, chains, strict=True)
        for i in range(len(chain))
    ]
    stream = replace(
        stream_of(found),
        blocks=np.array(found, np.int32),
        starts=starts,
        tokens=np.array(sizes, np.int32),
        prompt_tokens=np.array(tokens),
        block_size=4,
    )
    outcome = VLLM(**how).run(stream, capacity)
    return list(np.add.reduceat((outcome.hits == 1).astype(int), starts[:-1]))


def test_vllm_by_hand() -> None:
    # The last token is always computed: of two full blocks the first only.
    assert vllm_of([8, 8, 9], [[0, 1], [0, 1], [0, 1, 2]], 8) == [0, 1, 2]
    # The tail of a finished request goes first, and a part-filled block before all.
    assert vllm_of([9, 12, 9], [[0, 1, 2], [3, 4, 5], [0, 1, 2]], 5) == [0, 0, 2]
    assert vllm_of([9, 16, 9], [[0, 1, 2], [3, 4, 5, 6], [0, 1, 2]], 5) == [0, 0, 1]
    # Blocks in use are not evicted: with two requests in flight the first one's stay.
    tokens, chains = [8, 8, 8, 9], [[0, 1], [2, 3], [4, 5], [0, 1, 6]]
    assert vllm_of(tokens, chains, 6, in_flight=3) == [0, 0, 0, 2]
    # What does not fit beside them waits for the oldest.
    assert vllm_of(tokens, chains, 4, in_flight=3) == [0, 0, 0, 0]
    # A request that is larger than the pool never runs.
    assert vllm_of([12, 5, 5], [[0, 1, 2], [0, 1], [0, 1]], 2) == [0, 0, 1]


def test_levels_by_hand() -> None:
    stream = stream_of([0, 1, 2, 3, 4, 5, 0, 1, 2, 3], length=3)
    # Requests 0 1 2, 3 4 5, 0 1 2, 3: the first block of each is pinned.
    found = parse_block_policy("pinned_prefix:prefix=1").run(stream, 4)
    assert found.hits.tolist() == [0, 0, 0, 0, 0, 0, 1, 0, 0, 1]
    hard = parse_block_policy("pinned_prefix:prefix=9,hard=true").run(stream, 4)
    assert (hard.hits.tolist(), hard.evictions) == ([0, 0, 0, 0, 3, 3, 1, 1, 1, 1], 0)
    last = parse_block_policy("sliding_window:window=1").run(stream, 9)
    assert last.hits.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 1, 0]
    read = parse_block_policy("recent_n:n=2").run(stream, 9)
    assert read.hits.tolist() == [2, 0, 0, 2, 0, 0, 2, 1, 1, 1]
    ranked = parse_block_policy("priority:first=1").run(stream, 3)
    assert ranked.hits.tolist() == [0, 0, 0, 0, 0, 0, 1, 0, 0, 1]
