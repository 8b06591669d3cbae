"""Block policies of one's own, and the contract that all policies keep."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.blocks import stream_of

from kvtrace.errors import InputError
from kvtrace_viewer.blocks import POLICIES, BlockPolicy, parse_block_policy, replay_blocks
from kvtrace_viewer.blocks.guard import Guard
from kvtrace_viewer.blocks.policies.lru import LRU
from kvtrace_viewer.blocks.policy import Hits
from kvtrace_viewer.blocks.stream import Ids
from kvtrace_viewer.blocks.testing import BlockPolicyContract, chains

MINE = '''
"""A policy of one's own."""
from collections import OrderedDict
from dataclasses import dataclass

from kvtrace_viewer.blocks import StepPolicy, parameter


@dataclass(frozen=True, kw_only=True)
class Mine(StepPolicy):
    """Evict the least recently used, but never the newest ones."""

    newest: int = parameter(0, "newest blocks that are spared", "blocks", 0)

    def start(self, capacity):
        return OrderedDict()

    def hit(self, state, block):
        state.move_to_end(block)

    def insert(self, state, block):
        state[block] = None

    def evict(self, state):
        return state.popitem(last=False)[0]
'''


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "belady"])
def test_our_policies_keep_the_contract(name: str) -> None:
    kit = type("Kit", (BlockPolicyContract,), {"policy": name})()
    kit.test_nothing_beats_belady()
    kit.test_a_block_must_have_come_before_it_hits()
    kit.test_no_more_is_held_than_fits()
    kit.test_evictions_are_of_blocks_that_came()
    kit.test_it_is_deterministic()
    # A window below one block lets nothing in, so misses do not come in.
    whole = {"wtinylfu": "wtinylfu:window=1"}.get(name, name)
    type("Kit", (BlockPolicyContract,), {"policy": whole})().test_what_must_stay_is_not_evicted()
    if name != "wtinylfu":
        # Its sketch is sized by the capacity alone, but hashes the ids, which the begin shares.
        kit.test_the_future_is_not_known()
    if name not in ("vllm", "recent_n", "sliding_window"):
        kit.test_a_cache_of_all_blocks_evicts_nothing()


class Liar(BlockPolicy):
    """Everything hits."""

    name = "liar"

    def simulate(
        self, blocks: Ids, num_blocks: int, capacity: int, hits: Hits, guard: Guard | None = None
    ) -> int:
        hits[:] = 1
        return len(blocks)


def test_the_contract_can_fail() -> None:
    kit = type("Kit", (BlockPolicyContract,), {"policy": Liar()})()
    for test in (
        kit.test_nothing_beats_belady,
        kit.test_a_block_must_have_come_before_it_hits,
        kit.test_no_more_is_held_than_fits,
        kit.test_evictions_are_of_blocks_that_came,
        kit.test_a_cache_of_all_blocks_evicts_nothing,
    ):
        with pytest.raises(AssertionError):
            test()


class Deaf(LRU):
    """It takes a guard and does not listen."""

    name = "deaf"

    def simulate(
        self, blocks: Ids, num_blocks: int, capacity: int, hits: Hits, guard: Guard | None = None
    ) -> int:
        return super().simulate(blocks, num_blocks, capacity, hits)


def test_the_contract_fails_a_policy_that_evicts_what_must_stay() -> None:
    kit = type("Kit", (BlockPolicyContract,), {"policy": Deaf()})()
    with pytest.raises(AssertionError):
        kit.test_what_must_stay_is_not_evicted()


def test_a_policy_of_ones_own_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    stream = chains(3)
    mine, named, lru = replay_blocks(stream, [f"{file}:newest=2", f"{file}:Mine", "lru"], [20])
    assert (mine.hits, mine.evictions) == (named.hits, named.evictions)
    assert (mine.hits, mine.evictions) == (lru.hits, lru.evictions)
    assert mine.policy == "mine.py:Mine:newest=2"
    kit = type("Kit", (BlockPolicyContract,), {"policy": f"{file}:Mine"})()
    kit.test_nothing_beats_belady()
    kit.test_what_must_stay_is_not_evicted()
    kit.test_the_future_is_not_known()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "has no class 'Mine'; its policies are none"),
        (MINE.replace("popitem(last=False)[0]", "popitem(last=False)[7]"), "in evict: IndexError"),
        (MINE.replace("return state.popitem(last=False)[0]", "return -1"), "which is not in the"),
        (MINE.replace("class Mine", "class Mine("), "mend that line"),
    ],
)
def test_a_file_that_errs_is_one_clear_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(InputError, match=said):
        replay_blocks(stream_of([0, 1, 2, 3]), [f"{file}:Mine"], [2])


def test_parameters_are_checked() -> None:
    assert parse_block_policy("s3fifo:small=0.2").spec == "s3fifo:small=0.2"
    for text, said in (
        ("s3fifo:small=-1", "a number of at least 0; s3fifo takes small"),
        ("s3fifo:small=nan", "a number of at least 0"),
        ("s3fifo:size=3", "expected each parameter once"),
        ("pinned_prefix:hard=yes", "true or false"),
        ("lru:k=2", "lru takes none"),
    ):
        with pytest.raises(InputError, match=said):
            parse_block_policy(text)
