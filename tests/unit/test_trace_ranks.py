"""What several processes recorded, read as one trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import kvtrace
from kvtrace.cached import model_kinds, not_together
from kvtrace.errors import InputError, TraceError
from kvtrace.places import RowPlaces
from kvtrace.ranks import NUMBERS_PER_RANK
from kvtrace.testing import write_synthetic
from kvtrace.writer import LayerSpec, TraceWriter
from kvtrace_viewer.derived.results import evicted_at
from kvtrace_viewer.replay import replay

SPECS = [LayerSpec(layer, 4, 2, 8, 8, 8**-0.5, rope_theta=1e4) for layer in range(2)]
#: Steps of one request by rank; the ranks in between recorded nothing.
STEPS = {0: [20, 1, 1], 2: [30, 1], 5: [12, 1, 1, 1]}


def put_projections(writer: TraceWriter, rank: int) -> None:
    """Other output projections in each rank, so that a policy must find its own."""
    values = np.random.default_rng(rank).normal(size=(2, 16, 32)).astype(np.float32)
    writer.put_static("wo", values, "layer,hidden,q_head_dim")


@pytest.fixture
def ranks(tmp_path: Path) -> kvtrace.Trace:
    """Three ranks in one trace."""
    for rank, steps in STEPS.items():
        path = tmp_path / "many.kvtrace"
        with TraceWriter(path, source="synthetic", rank=rank, launch="one") as writer:
            write_synthetic(writer, SPECS, steps, seed=rank)
            put_projections(writer, rank)
    return kvtrace.open(path)


@pytest.fixture
def alone(tmp_path: Path) -> dict[int, kvtrace.Trace]:
    """The same, each in a trace of its own."""
    found = {}
    for rank, steps in STEPS.items():
        with TraceWriter(tmp_path / f"{rank}.kvtrace", source="synthetic") as writer:
            write_synthetic(writer, SPECS, steps, seed=rank)
            put_projections(writer, rank)
        found[rank] = kvtrace.open(writer.path)
    return found


def test_every_rank_is_read(ranks: kvtrace.Trace, alone: dict[int, kvtrace.Trace]) -> None:
    assert ranks.rows == sum(map(sum, STEPS.values()))
    assert [one.request for one in ranks.requests()] == [r * NUMBERS_PER_RANK for r in STEPS]
    for rank, own in alone.items():
        request = rank * NUMBERS_PER_RANK
        assert ranks.tokens(request).equals(own.tokens())
        for head in range(4):
            np.testing.assert_array_equal(
                ranks.attention(1, head, request=request), own.attention(1, head)
            )
        np.testing.assert_array_equal(ranks.layer_data(0, request).v, own.layer_data(0).v)
        assert ranks.holdings(request).layers == own.holdings().layers


def test_rows_are_told_apart(ranks: kvtrace.Trace) -> None:
    found = ranks.sql(
        "select count(*) n, count(distinct row) distinct_rows, min(row), max(row),"
        " count(distinct tokens.text) from rows join tokens using (row)"
    )
    last = 5 * NUMBERS_PER_RANK + sum(STEPS[5]) - 1
    assert list(found.to_pylist()[0].values()) == [ranks.rows, ranks.rows, 0, last, 31]
    rows = np.concatenate([ranks.request_rows(one.request) for one in ranks.requests()])
    assert sorted(rows) == sorted(ranks.table("rows")["row"].to_pylist())


def test_one_replay_covers_all(ranks: kvtrace.Trace, alone: dict[int, kvtrace.Trace]) -> None:
    policies = ["h2o", "streaming_llm", "expected_attention", "criticalkv"]
    together = replay(ranks, policies, ["50%"], "prefill")
    assert ranks.table("replay_ranks")["rows"].to_pylist()[:3] == [22, 31, 15]
    for p, result in enumerate(together):
        assert result.tokens == ranks.rows
        parts = [replay(own, [result.policy], ["50%"], "prefill")[0] for own in alone.values()]
        assert result.hits == sum(part.hits for part in parts)
        assert result.evictions == sum(part.evictions for part in parts)
        for rank, part in zip(STEPS, parts, strict=True):
            column = evicted_at(ranks, result.id, 1, 1, rank * NUMBERS_PER_RANK)
            np.testing.assert_array_equal(column, part.evicted_at[:, 1, 1], str(p))


def test_what_is_not_there(ranks: kvtrace.Trace) -> None:
    for request in (1, NUMBERS_PER_RANK, 2 * NUMBERS_PER_RANK + 1, -1):
        with pytest.raises(InputError, match=rf"request {request} .*has 0, 2000000000, 5000000000"):
            ranks.attention(0, 0, request=request)
    with pytest.raises(TraceError, match=r"rank 1 was not found in .*; it has 0, 2, 5"):
        kvtrace.open(ranks.path, rank=1)
    only = kvtrace.open(ranks.path, rank=2)
    assert [one.request for one in only.requests()] == [2 * NUMBERS_PER_RANK]
    assert (only.rows, only.ranks, only.status) == (31, [0, 2, 5], "complete")


def test_a_rank_that_comes_later_is_seen(ranks: kvtrace.Trace) -> None:
    with TraceWriter(ranks.path, source="synthetic", rank=9, launch="one") as writer:
        write_synthetic(writer, [LayerSpec(0, 2, 1, 8, 8, 1.0)], [7])
        ranks.refresh()
        assert (ranks.status, ranks.requests()[-1].request) == ("recording", 9 * NUMBERS_PER_RANK)
    ranks.refresh()
    # Another model: what the others ran counts once.
    kinds = model_kinds(ranks)
    assert list(kinds.values()) == [0, 0, 0, 9 * NUMBERS_PER_RANK]
    everything = [one.request for one in ranks.requests()]
    assert not_together(ranks, everything[:-1]) is None
    assert not_together(ranks, everything) == "the requests are of several models"


def test_places() -> None:
    places = RowPlaces({0: 4, 3: 0, 7: 5})
    assert (places.first, places.rows) == ({0: 0, 3: 4, 7: 4}, 9)
    rows = np.array([2, 0], np.int64)
    assert places.of(rows + 7 * NUMBERS_PER_RANK).tolist() == [6, 4]
    assert places.of(rows[:0]).tolist() == []
