"""What every block policy must do; derive a test class from `BlockPolicyContract`.

>>> class TestMine(BlockPolicyContract):                                    # doctest: +SKIP
...     policy = "my_policy.py:Mine"
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from kvtrace_viewer.blocks.holding import holding_of, takes_guard
from kvtrace_viewer.blocks.policies.belady import Belady
from kvtrace_viewer.blocks.policy import HIT, MISS, UNREAD, BlockPolicy, Hits
from kvtrace_viewer.blocks.spec import parse_block_policy
from kvtrace_viewer.blocks.stream import BlockStream, dense_ids

#: Tokens of a block in the streams here.
_SIZE = 16


def chains(seed: int, requests: int = 300) -> BlockStream:
    """A synthetic stream, made up: requests that go on from prefixes of earlier ones."""
    rng = np.random.default_rng(seed)
    sequences: list[list[int]] = [[]]
    fresh = 0
    for _ in range(requests):
        source = sequences[rng.integers(max(0, len(sequences) - 40), len(sequences))]
        more = int(rng.integers(1, 8))
        sequences.append([*source[: rng.integers(0, 12)], *range(fresh, fresh + more)])
        fresh += more
    lengths = np.array([len(one) for one in sequences[1:]])
    blocks, number = dense_ids(np.concatenate([np.array(s, np.int64) for s in sequences[1:]]))
    return BlockStream(
        blocks=blocks,
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        tokens=np.full(len(blocks), _SIZE, np.int32),
        is_output=np.zeros(len(blocks), np.bool_),
        arrival_ns=np.arange(requests),
        prompt_tokens=_SIZE * lengths,
        block_size=_SIZE,
        num_blocks=number,
    )


class BlockPolicyContract:
    """Tests that hold for every policy: ours pass them, and yours should.

    Attributes
    ----------
    policy : str or BlockPolicy
        The policy, as `--policy` takes it.
    keeps_all : bool
        Whether a cache of all blocks keeps them all (an admission filter may not).
    """

    policy: ClassVar[str | BlockPolicy] = "lru"
    keeps_all: ClassVar[bool] = True
    capacities: ClassVar[tuple[int, ...]] = (1, 2, 7, 50, 200)
    seeds: ClassVar[tuple[int, ...]] = (0, 1)

    def _run(self, stream: BlockStream, capacity: int) -> tuple[Hits, int]:
        outcome = parse_block_policy(self.policy).run(stream, capacity)
        return outcome.hits, outcome.evictions

    def test_nothing_beats_belady(self) -> None:
        """No policy hits more than the one that knows the future."""
        for stream in map(chains, self.seeds):
            for capacity in self.capacities:
                best = np.count_nonzero(Belady().run(stream, capacity).hits == HIT)
                found = np.count_nonzero(self._run(stream, capacity)[0] == HIT)
                assert found <= best, f"capacity {capacity}: {found} hits, Belady {best}"

    def test_a_block_must_have_come_before_it_hits(self) -> None:
        """The first access of a block is never a hit."""
        for stream in map(chains, self.seeds):
            first = np.unique(stream.blocks, return_index=True)[1]
            for capacity in self.capacities:
                assert not (self._run(stream, capacity)[0][first] == HIT).any()

    def test_no_more_is_held_than_fits(self) -> None:
        """A cache of one block hits only what was asked for just before."""
        for stream in map(chains, self.seeds):
            hits = self._run(stream, 1)[0]
            again = np.flatnonzero(hits == HIT)
            assert (stream.blocks[again] == stream.blocks[again - 1]).all()

    def test_a_cache_of_all_blocks_evicts_nothing(self) -> None:
        """With room for everything, every later access hits."""
        for stream in map(chains, self.seeds):
            hits, evictions = self._run(stream, stream.num_blocks)
            if self.keeps_all:
                assert evictions == 0
                first = np.unique(stream.blocks, return_index=True)[1]
                assert (np.delete(hits, first) == HIT).all()

    def test_evictions_are_of_blocks_that_came(self) -> None:
        """No more evictions than misses."""
        for stream in map(chains, self.seeds):
            for capacity in self.capacities:
                hits, evictions = self._run(stream, capacity)
                assert 0 <= evictions <= stream.accesses - np.count_nonzero(hits == HIT)

    def test_what_must_stay_is_not_evicted(self) -> None:
        """The first block of a prompt stays, and so do the blocks of the last three requests.

        A policy that takes no guard, or asks for whole prefixes only, is passed.
        """
        policy = parse_block_policy(self.policy)
        if policy.needs_full_blocks or not takes_guard(policy):
            return
        for stream in map(chains, self.seeds):
            holding = holding_of(stream, pin=1, hold=3)
            assert holding is not None
            for capacity in self.capacities:
                hits = policy.run(stream, capacity, holding.guard()).hits
                stays = np.zeros(stream.num_blocks, np.int64)
                here = np.zeros(stream.num_blocks, np.bool_)
                for i, block in enumerate(stream.blocks):
                    here[block] &= stays[block] > i
                    assert not here[block] or hits[i] in (HIT, UNREAD), f"capacity {capacity}"
                    stays[block] = max(stays[block], holding.until[i])
                    here[block] |= hits[i] in (HIT, MISS)

    def test_it_is_deterministic(self) -> None:
        """The same stream gives the same result."""
        stream = chains(self.seeds[0])
        for capacity in self.capacities:
            first, again = self._run(stream, capacity), self._run(stream, capacity)
            assert first[1] == again[1]
            assert np.array_equal(first[0], again[0])

    def test_the_future_is_not_known(self) -> None:
        """What comes later changes nothing before; of a policy of ours only Belady's does."""
        stream = chains(self.seeds[0])
        half = stream.requests // 2
        stop = int(stream.starts[half])
        blocks, number = dense_ids(stream.blocks[:stop].astype(np.int64))
        begin = BlockStream(
            blocks=blocks,
            starts=stream.starts[: half + 1],
            tokens=stream.tokens[:stop],
            is_output=stream.is_output[:stop],
            arrival_ns=stream.arrival_ns[:half],
            prompt_tokens=stream.prompt_tokens[:half],
            block_size=stream.block_size,
            num_blocks=number,
        )
        for capacity in self.capacities:
            whole = self._run(stream, capacity)[0][:stop]
            assert np.array_equal(self._run(begin, capacity)[0], whole)
