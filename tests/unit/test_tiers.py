"""Memory tiers: hand-worked schedules to the nanosecond, and what holds for any workload."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtrace import InputError
from kvtrace.cli import main
from kvtrace_viewer.blocks import BlockStream, dense_ids
from kvtrace_viewer.tiers import (
    Hardware,
    Options,
    ServedModel,
    Tier,
    TierResult,
    read_hardware,
    replay_tiers,
    shipped,
)
from kvtrace_viewer.tiers.order import ORDERS

SIZE = 1000
#: A block of 4 tokens has 1000 bytes; a token takes 100 ns to compute.
MODEL = ServedModel(
    name="made up", kv_bytes_per_token=250, parameters=0, layers=4, ns_per_token=100.0
)
PLAIN = Options(load="always", overlap=False)


def workload(*requests: str, arrivals: list[int] | None = None) -> BlockStream:
    """Requests as letters, a block each, of 4 tokens."""
    lengths = [len(request) for request in requests]
    blocks, number = dense_ids(np.array([ord(c) for c in "".join(requests)], np.int64))
    return BlockStream(
        blocks=blocks,
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        tokens=np.full(len(blocks), 4, np.int32),
        is_output=np.zeros(len(blocks), np.bool_),
        arrival_ns=np.array(arrivals or [0] * len(requests), np.int64),
        prompt_tokens=np.array(lengths, np.int64) * 4,
        block_size=4,
        num_blocks=number,
    )


def machine(first: int, *below: int, read: float = 1e9, write: float = 1e9) -> Hardware:
    """Tiers of so many blocks; a block takes 1000 ns up or down a link, after 50 ns."""
    # 90% of the first tier serve the cache.
    top = Tier("HBM", round(first * SIZE / 0.9) + 1, 1e12, 1e12, 0, "made up")
    rest = (
        Tier(f"below{n}", blocks * SIZE, read, write, 50e-9, "made up")
        for n, blocks in enumerate(below, start=1)
    )
    return Hardware("made up", (top, *rest))


def times(result: TierResult) -> list[tuple[int, int]]:
    ledger = result.ledger
    return list(zip(ledger.start_ns.tolist(), ledger.end_ns.tolist(), strict=True))


def test_a_schedule_worked_by_hand() -> None:
    # Two blocks fit. abcd are 4 tokens of 100 ns each.
    result = replay_tiers(workload("ab", "c", "ab"), machine(2, 4), MODEL, PLAIN)
    ledger = result.ledger
    # ab: 800 ns. c: pushes out a: 50 + 1000 ns down, longer than its 400 ns of computing.
    # ab: a is below, b above: a comes up in 50 + 1000 ns, then the last token is computed; c,
    # the least recently used but a, which is needed, goes down in 50 + 1000 ns beside it.
    assert times(result) == [(0, 800), (800, 1850), (1850, 1850 + 1050 + 100)]
    assert ledger.found.tolist() == [[0, 0], [0, 0], [1, 1]]
    assert ledger.missed.tolist() == [2, 1, 0]
    assert ledger.up[:, 1].tolist() == [0, 0, 1]
    assert ledger.down[:, 1].tolist() == [0, 1, 1]
    assert ledger.occupancy.tolist() == [[2, 0], [2, 1], [2, 1]]
    assert result.stall_ns.tolist() == [0, 650, 1050]


def test_a_block_is_staged_through_every_tier_between() -> None:
    # One block in the first tier, one in the second: a is in the third when it is asked again.
    found = replay_tiers(workload("a", "b", "c", "a"), machine(1, 1, 4), MODEL, PLAIN)
    ledger = found.ledger
    assert ledger.found.tolist()[3] == [0, 0, 1]
    assert ledger.up.tolist()[3] == [0, 1, 1]
    # Two links, one after the other, then c goes down, while the last token is computed.
    start, end = times(found)[3]
    assert end - start == 2 * 1050 + 100


def test_written_through_blocks_leave_without_traffic() -> None:
    through = replace(PLAIN, mode="write-through")
    found = replay_tiers(workload("ab", "c", "ab"), machine(2, 4), MODEL, through)
    assert found.ledger.down[:, 1].tolist() == [2, 1, 0]
    # c's computing is not held up by the copying of a and b.
    assert times(found)[:2] == [(0, 800), (800, 1200)]
    # a and b: 50 + 2 * 1000 after 800; c's follows: 50 + 1000.
    assert found.ledger.backlog_ns.tolist()[:2] == [2050, 2850 - 1200 + 1050]
    assert found.ledger.occupancy.tolist() == [[2, 2], [2, 3], [2, 3]]


def test_loads_hide_behind_the_layers_before() -> None:
    stream = workload("ab", "c", "abcdef")
    result = replay_tiers(stream, machine(6, 6), MODEL, replace(PLAIN, overlap=True))
    assert result.stall_ns.tolist() == [0, 0, 0]
    small = machine(3, 6)
    stream = workload("abc", "d", "a")
    shown = replay_tiers(stream, small, MODEL, replace(PLAIN, overlap=True))
    hidden = replay_tiers(stream, small, MODEL, PLAIN)
    # a comes up in 1050 ns; 100 ns of computing, a quarter of which is the last layer's.
    assert times(hidden)[2][1] - times(hidden)[2][0] == 1150
    assert times(shown)[2][1] - times(shown)[2][0] == 1075


def test_a_load_is_left_where_computing_is_sooner() -> None:
    # 4 tokens of 100 ns against 1050 ns of loading.
    cheaper = replay_tiers(
        workload("a", "b", "a"), machine(1, 4), MODEL, Options(overlap=False, load="cheaper")
    )
    assert cheaper.ledger.recomputed.tolist() == [0, 0, 1]
    assert cheaper.ledger.up.sum() == 0
    assert cheaper.ledger.work_ns.tolist() == [400, 400, 400]
    # The copy below is of no use any more, and b takes its place there.
    assert cheaper.ledger.occupancy.tolist()[2] == [1, 1]


def test_prefetching_begins_while_a_request_waits() -> None:
    # The third comes while the second computes 4 * 4 tokens.
    stream = workload("a", "bcde", "a", arrivals=[0, 400, 500])
    late = replay_tiers(stream, machine(4, 8), MODEL, PLAIN)
    early = replay_tiers(stream, machine(4, 8), MODEL, replace(PLAIN, prefetch=True))
    (start, end), (early_start, early_end) = times(late)[2], times(early)[2]
    assert start == early_start
    assert end - start == 1150
    # Loaded from 500 to 1550, before the turn comes at 2000.
    assert early_end - early_start < end - start


def test_a_request_larger_than_the_first_tier_is_refused_and_said_so() -> None:
    found = replay_tiers(workload("a", "abc", "a"), machine(2, 9), MODEL, PLAIN)
    assert found.served.tolist() == [True, False, True]
    assert found.to_json()["refused"] == 1
    assert found.ledger.found.tolist()[2] == [1, 0]


requests = st.lists(st.text("abcdefgh", min_size=1, max_size=5), min_size=1, max_size=25)
rules = st.builds(
    Options,
    policy=st.sampled_from(list(ORDERS)),
    mode=st.sampled_from(["evict", "write-through"]),
    load=st.sampled_from(["cheaper", "always"]),
    overlap=st.booleans(),
    prefetch=st.booleans(),
)
sizes = st.tuples(st.integers(5, 9), st.integers(0, 6), st.integers(0, 12))


@settings(max_examples=150, deadline=None)
@given(requests, rules, sizes)
def test_every_block_is_accounted_for(
    letters: list[str], options: Options, blocks: tuple[int, int, int]
) -> None:
    stream = workload(*letters)
    result = replay_tiers(stream, machine(*blocks), MODEL, options)
    ledger = result.ledger
    # What was asked for was found, computed anew, or nowhere.
    asked = np.diff(stream.starts)
    assert (ledger.found.sum(axis=1) + ledger.recomputed + ledger.missed == asked).all()
    assert (ledger.occupancy <= np.array(result.capacities)).all()
    assert (ledger.end_ns >= ledger.start_ns + ledger.work_ns).all()
    if options.mode == "evict":
        # Nothing is in two places, nothing vanishes: blocks in all tiers and lost ones are all
        # that were ever made; of those made anew, the copy below was dropped on purpose.
        first_seen = np.array([len(set("".join(letters[: n + 1]))) for n in range(len(letters))])
        assert (ledger.occupancy.sum(axis=1) <= first_seen).all()
        # A link's tier holds what came down less what went up and further down, or was dropped.
        down, up = ledger.down.cumsum(axis=0), ledger.up.cumsum(axis=0)
        held_below = down[:, 1] - up[:, 1]
        assert (ledger.occupancy[:, 1:].sum(axis=1) <= held_below).all()


@settings(max_examples=60, deadline=None)
@given(requests, sizes)
def test_faster_links_never_end_later(letters: list[str], blocks: tuple[int, int, int]) -> None:
    stream = workload(*letters)
    slow = replay_tiers(stream, machine(*blocks), MODEL, PLAIN)
    fast = replay_tiers(stream, machine(*blocks, read=2e9, write=3e9), MODEL, PLAIN)
    assert (fast.ledger.found == slow.ledger.found).all()
    assert (fast.ledger.end_ns <= slow.ledger.end_ns).all()


@settings(max_examples=60, deadline=None)
@given(requests, st.integers(5, 9), st.integers(0, 6), st.integers(0, 6))
def test_more_room_below_is_never_found_less_often(
    letters: list[str], first: int, below: int, more: int
) -> None:
    # LRU over one list of all tiers: a larger one holds what a smaller one holds.
    stream = workload(*letters)
    small = replay_tiers(stream, machine(first, below), MODEL, PLAIN).ledger
    large = replay_tiers(stream, machine(first, below + more), MODEL, PLAIN).ledger
    assert large.found.sum() >= small.found.sum()


def test_every_shipped_machine_reads_and_says_its_sources() -> None:
    assert {"a100", "h100", "h200", "b200", "grace-hopper", "laptop"} <= set(shipped())
    for name in shipped():
        hardware = read_hardware(name)
        assert hardware.flops > 0
        assert all(len(tier.source) > 10 for tier in hardware.tiers)
        first, *rest = hardware.tiers
        assert all(first.read > tier.read for tier in rest)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name = 3 =", "is no TOML"),
        ("speed = 3", "'speed'"),
        ("[[tier]]\nname='a'\ncapacity=1\nread=1\nwrite=1", "fewer than two"),
        ("[[tier]]\nname='a'\n[[tier]]\nname='b'", "tier a with name"),
        ("[[tier]]\nname='a'\ncapacity=1\nread=0\nwrite=1\n[[tier]]\nname='b'", "read = 0"),
    ],
)
def test_what_is_wrong_in_a_hardware_file_is_said(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        read_hardware(str(path))


def test_the_command_measures_and_replays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvtrace_viewer.tiers import calibrate

    monkeypatch.setattr(calibrate, "WRITTEN", 8 << 20)
    monkeypatch.setattr(calibrate, "COPIED", 8 << 20)
    assert main(["tiers", "calibrate", "--folder", str(tmp_path)]) == 0
    measured = capsys.readouterr().out
    (tmp_path / "mine.toml").write_text(measured)
    assert all(tier.read > 1e6 for tier in read_hardware(str(tmp_path / "mine.toml")).tiers)
    source = tmp_path / "mooncake.jsonl"
    lines = [
        {"timestamp": n, "input_length": 1024, "output_length": 1, "hash_ids": [0, n]}
        for n in range(1, 9)
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    trace = str(tmp_path / "load.kvtrace")
    assert main(["import", "mooncake", str(source), "--out", trace]) == 0
    capsys.readouterr()
    assert main(["tiers", trace, "--tiers", "h100", "--capacity", "DRAM=1GB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["requests"] == 8
    assert sum(tier["hits"] for tier in found["tiers"]) + found["missed"] == 16
    assert main(["tiers", trace]) == 0
    assert "time to first token" in capsys.readouterr().out
    assert main(["tiers", trace, "--capacity", "tape=1GB"]) == 1
    assert "one of HBM, DRAM, NVMe, remote" in capsys.readouterr().err
