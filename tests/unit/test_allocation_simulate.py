"""What-if servers: nothing is lost at any event, and worked examples by hand."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from tests.support.allocation import workload

from kvtrace.errors import InputError
from kvtrace_viewer.allocation.history import ALLOCATE, EVICT, FREE, KEEP, SHARE
from kvtrace_viewer.allocation.pool import POLICIES, BlockPool
from kvtrace_viewer.allocation.result import PoolResult
from kvtrace_viewer.allocation.settings import ADMISSIONS, PREEMPTIONS, SCHEDULERS, Settings
from kvtrace_viewer.allocation.simulate import Server
from kvtrace_viewer.allocation.whatif import what_if


class Watched(Server):
    """A server whose every event is checked against a pool kept by the events alone."""

    def watch(self) -> None:
        self.state = ["free"] * self.pool.size
        self.users: list[list[int]] = [[] for _ in range(self.pool.size)]
        tell = self.pool.emit

        def emit(kind: int, request: int, block: int, index: int) -> None:
            self.check(kind, request, block)
            tell(kind, request, block, index)

        self.pool.emit = emit

    def check(self, kind: int, request: int, block: int) -> None:
        state, users = self.state[block], self.users[block]
        if kind == ALLOCATE:
            assert state == "free"
            assert not users
        if kind == SHARE:
            assert state in ("held", "cached")
        if kind in (ALLOCATE, SHARE):
            users.append(request)
            self.state[block] = "held"
        elif kind in (FREE, KEEP):
            # Only from who has it.
            users.remove(request)
            if not users:
                self.state[block] = "cached" if kind == KEEP else "free"
        else:
            # Never from a request that needs it.
            assert kind == EVICT
            assert state == "cached"
            assert not users
            self.state[block] = "free"

    def check_all(self) -> None:
        """The pool's own books say the same, and every block stands in one of them."""
        pool = self.pool
        assert pool.free + len(pool.cached) + len(pool.users) == pool.size
        held = {block for block, state in enumerate(self.state) if state == "held"}
        assert held == set(pool.users)
        assert {b for b, s in enumerate(self.state) if s == "cached"} == set(pool.cached)
        tables: dict[int, list[int]] = {}
        for job in self.active.values():
            assert len(job.table) >= -(-job.position // self.settings.block_size)
            for block in job.table:
                tables.setdefault(block, []).append(job.asked.request)
        assert {b: sorted(r) for b, r in tables.items()} == {b: sorted(self.users[b]) for b in held}


REQUESTS = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(0, 20)), min_size=1, max_size=9
)


@settings(max_examples=150, deadline=None)
@given(
    REQUESTS,
    st.integers(0, 20),
    st.integers(1, 7),
    st.integers(1, 25),
    st.integers(1, 5),
    st.integers(1, 24),
    st.sampled_from(list(ADMISSIONS)),
    st.sampled_from(list(POLICIES)),
    st.sampled_from(list(PREEMPTIONS)),
    st.sampled_from(list(SCHEDULERS)),
)
def test_blocks_are_conserved_at_every_event_and_nobody_is_forgotten(
    lengths: list[tuple[int, int, int]],
    shared: int,
    block_size: int,
    pool: int,
    max_batch: int,
    max_batch_tokens: int,
    admission: str,
    policy: str,
    preempt: str,
    scheduler: str,
) -> None:
    server = Watched(
        workload(lengths, shared, steps=30),
        Settings(
            block_size=block_size,
            pool=pool,
            max_batch=max_batch,
            max_batch_tokens=max_batch_tokens,
            admission=admission,
            policy=policy,
            preempt=preempt,
            scheduler=scheduler,
            swap_blocks=pool if preempt == "swap" else 0,
        ),
    )
    server.watch()
    for _ in range(20_000):
        if not server.left:
            break
        server.step()
        server.check_all()
    assert not server.left
    # Each was served to its end, or named with the reason.
    run = server.run
    assert len(run.jobs) + len(run.refused) == len(lengths)
    for job in run.jobs:
        assert job.generated == job.asked.answer_tokens
        own = [part for part in run.parts if part[1] == job.asked.request]
        assert sum(count for *_, count in own) == job.asked.tokens - job.found + job.recomputed
    for number, (prompt, answer, _) in enumerate(lengths):
        assert (number in run.refused) == (-(-(prompt + answer - 1) // block_size) > pool)


def settings_of(**changed: object) -> Settings:
    given: dict[str, object] = {
        "block_size": 4,
        "pool": 4,
        "max_batch": 4,
        "max_batch_tokens": 16,
        "safety_margin": 0.0,
        **changed,
    }
    return Settings(**given)  # type: ignore[arg-type]


def test_what_does_not_fit_is_preempted_and_comes_back() -> None:
    # Two requests of 8 + 5 - 1 = 12 tokens, 3 blocks each, in 4 blocks: both begin with two, at
    # the ninth token the first takes none, since none is left, and the newer one has to go.
    found = what_if(workload([(8, 5, 0), (8, 5, 0)]), settings_of(policy="none"))
    jobs = found.run.jobs
    assert [job.preemptions for job in jobs] == [0, 1]
    assert jobs[1].recomputed == 8
    assert [job.end_step for job in jobs] == [4, 8]
    result = PoolResult.of(found)
    assert result.occupancy.held.tolist() == [4, 3, 3, 3, 3, 3, 3, 3, 3]


def test_swapped_requests_process_nothing_twice() -> None:
    asked = workload([(8, 5, 0), (8, 5, 0)])
    found = what_if(asked, settings_of(policy="none", preempt="swap", swap_blocks=2))
    assert [job.recomputed for job in found.run.jobs] == [0, 0]
    assert found.run.swapped_out == 2
    # Where there is no room for it, it is computed again.
    found = what_if(asked, settings_of(policy="none", preempt="swap", swap_blocks=1))
    assert [job.recomputed for job in found.run.jobs] == [0, 8]


def test_a_request_larger_than_the_pool_is_refused_by_name() -> None:
    found = what_if(workload([(17, 1, 0), (4, 1, 0)]), settings_of())
    assert found.run.refused == {
        0: "req_0 needs 5 blocks of 4 tokens for its 17 tokens; the pool has 4; it would never end"
    }
    assert [job.end_step for job in found.run.jobs] == [0]


def test_admission_decides_who_waits() -> None:
    asked = workload([(16, 1, 0), (4, 1, 0), (8, 1, 0)])
    by = {
        admission: what_if(asked, settings_of(max_batch=1, admission=admission))
        for admission in ADMISSIONS
    }

    def order(name: str) -> list[int]:
        return [request for _, request, _, _ in by[name].run.parts]

    assert order("fcfs") == [0, 1, 2]
    assert order("shortest_prompt") == order("shortest_job") == [1, 2, 0]
    assert order("longest_job") == [0, 2, 1]
    waits = [sorted(PoolResult.of(one).waits.values()) for one in by.values()]
    assert all([steps for steps, _ in one] == [0, 1, 2] for one in waits)


def test_a_shared_prefix_is_found_in_blocks_of_another() -> None:
    asked = workload([(9, 2, 0), (9, 2, 1)], shared=8)
    found = what_if(asked, settings_of(pool=8, policy="lru"))
    assert [job.found for job in found.run.jobs] == [0, 8]
    assert found.run.parts[1:3] == [(1, 0, 9, 1), (1, 1, 8, 1)]
    pool = PoolResult.of(found).occupancy
    assert pool.shared.tolist() == [0, 2, 0]
    assert np.array_equal(pool.held + pool.cached + pool.free, [8, 8, 8])


@pytest.mark.parametrize(
    ("policy", "victims"), [("lru", [1, 0]), ("fifo", [0, 1]), ("lfu", [1, 0]), ("all", [0, 1])]
)
def test_policies_choose_what_goes(policy: str, victims: list[int]) -> None:
    evicted = []

    def emit(kind: int, request: int, block: int, index: int) -> None:
        if kind == EVICT:
            evicted.append(names[block])

    pool = BlockPool(2, policy, emit)
    tables: list[list[int]] = [[], []]
    for request in (0, 1):
        pool.allocate(request, tables[request], 1)
        pool.complete(request, tables[request], [request], 1)
    names = {table[0]: request for request, table in enumerate(tables)}
    # The first is shared once, and let go last.
    pool.share(2, tables[0][0], 0)
    pool.release(2, [tables[0][0]])
    pool.release(1, tables[1])
    pool.release(0, tables[0])
    if policy == "all":
        pool.evict_cached()
        assert sorted(evicted) == victims
    else:
        pool.allocate(3, [], 2)
        assert evicted == victims


@pytest.mark.parametrize("wrong", [{"pool": 0}, {"policy": "best"}, {"safety_margin": 2}])
def test_settings_that_are_none_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r".*; .* expected; .*"):
        settings_of(**wrong)
