"""LRU curves: every capacity in one pass, and by a sample."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.blocks import MOONCAKE, REFERENCE, imported, needs_mooncake, stream_of

import kvtrace.cli
from kvtrace.errors import InputError
from kvtrace_viewer.blocks import (
    Accounting,
    BlockStream,
    curve_capacities,
    lru_curve,
    replay_blocks,
    replay_curves,
    sampled_lru_curve,
)

MODES = [
    Accounting(hits=hits, blocks=blocks, unit=unit)
    for hits in ("block", "prefix")
    for blocks in ("all", "full")
    for unit in ("block", "token")
]


def check(stream: BlockStream, capacities: list[int], accounting: Accounting) -> None:
    points = replay_curves(stream, ["lru"], capacities, accounting)
    assert points == replay_blocks(stream, ["lru"], sorted(set(capacities)), accounting)


@settings(max_examples=40, deadline=None)
@given(blocks=st.lists(st.integers(0, 20), min_size=1, max_size=200), part=st.integers(1, 15))
def test_the_curve_is_every_lru_run(blocks: list[int], part: int) -> None:
    stream = stream_of(blocks, last_tokens=part)
    for accounting in MODES:
        check(stream, list(range(1, stream.num_blocks + 3)), accounting)


@needs_mooncake
def test_on_mooncake_curve_and_sample_agree_with_the_runs(tmp_path: Path) -> None:
    stream = imported(MOONCAKE, tmp_path)
    check(stream, [1, 10, 1000, 5859, 100_000, 200_000], Accounting())
    exact = lru_curve(stream)
    for rate in (0.3, 0.1):
        sampled = sampled_lru_curve(stream, rate)
        off = np.abs(sampled.hits - exact.hits) / stream.accesses
        assert sampled.error is not None
        # Without the adjustment it is 0.04: one block alone is 4% of the accesses.
        assert off.mean() < 0.003
        assert (off <= sampled.error).mean() > 0.9


def test_a_sample_of_all_blocks_is_near_the_curve(tmp_path: Path) -> None:
    stream = imported(REFERENCE / "sessions_a.jsonl", tmp_path)
    for accounting in (Accounting(), Accounting(unit="token"), Accounting(blocks="full")):
        exact, sampled = lru_curve(stream, accounting), sampled_lru_curve(stream, 1, accounting)
        assert sampled.accesses == exact.accesses
        assert np.abs(sampled.hits - exact.hits).mean() / exact.accesses < 0.003


def test_what_cannot_be_sampled_is_refused() -> None:
    stream = stream_of([0, 1, 0])
    for rate in (0, -1, 1.5, float("nan")):
        with pytest.raises(InputError, match="is no share of the blocks"):
            sampled_lru_curve(stream, rate)
    with pytest.raises(InputError, match="no prefixes"):
        sampled_lru_curve(stream, 0.5, Accounting(hits="prefix"))
    with pytest.raises(InputError, match="fifo cannot be run on a sample"):
        replay_curves(stream, ["lru", "fifo"], [1], sample=0.5)
    with pytest.raises(InputError, match="capacity 0 holds no block"):
        replay_curves(stream, ["lru"], [0])


def test_the_verb_draws_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream = imported(REFERENCE / "sessions_a.jsonl", tmp_path)
    capsys.readouterr()
    trace = str(tmp_path / "a.kvtrace")
    words = ["blocks", trace, "--policy", "lru", "--policy", "sieve", "--curve"]
    assert kvtrace.cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["capacity"] for one in found] == curve_capacities(stream) * 2
    assert [one["policy"] for one in found] == ["lru"] * (len(found) // 2) + ["sieve"] * (
        len(found) // 2
    )
    assert found[0]["accounting"] == {"hits": "block", "blocks": "all", "unit": "block"}
    assert kvtrace.cli.main(words) == 0
    assert "hit ratio" in capsys.readouterr().out
    assert kvtrace.cli.main(["blocks", trace, "--policy", "lru"]) == 1
    assert "add --capacity 10000" in capsys.readouterr().err
