"""Several traces as one: nothing is lost, and whose everything is stays told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvtrace
from kvtrace import tables
from kvtrace.cli import main
from kvtrace.errors import InputError, TraceError
from kvtrace.merge import merge
from kvtrace.ranks import NUMBERS_PER_RANK, is_numbered
from kvtrace.renumber import RANK_COLUMNS, renumbered
from kvtrace.store import StoreWriter
from kvtrace.testing import write_synthetic
from kvtrace.writer import LayerSpec, TraceWriter
from kvtrace_viewer.derived.results import evicted_at
from kvtrace_viewer.replay import replay
from kvtrace_viewer.replay.regret import compute_regrets, store_regrets

SPECS = [LayerSpec(layer, 4, 2, 8, 8, 8**-0.5) for layer in range(2)]
NEW = [rank * NUMBERS_PER_RANK for rank in range(3)]


@pytest.fixture
def servers(tmp_path: Path) -> list[kvtrace.Trace]:
    """Two traces, of two ranks and of one; both with a replay of one name, one cut off."""
    for rank, steps in ((1, [30, 1, 1]), (4, [20, 1])):
        with TraceWriter(
            tmp_path / "a.kvtrace", source="synthetic", rank=rank, launch="one"
        ) as one:
            write_synthetic(one, SPECS, steps, seed=rank)
            one.put_static("wo", np.full((2, 3, 4), rank, np.float32), "layer,hidden,head")
            rows = np.arange(5, 9)
            one.add_received(0, 1, rows, np.full((4, 4), 0.5, np.float32))
    with TraceWriter(tmp_path / "b.kvtrace", source="imported") as two:
        write_synthetic(two, SPECS, [25, 1, 1, 1], seed=9)
        two.close(complete=False)
    found = [kvtrace.open(tmp_path / name) for name in ("a.kvtrace", "b.kvtrace")]
    for trace in found:
        (result,) = replay(trace, ["h2o"], ["50%"])
        (regrets,) = compute_regrets(trace, {result.id: result.evicted_at}).values()
        store_regrets(trace, result.id, regrets)
    return found


def test_everything_is_there(servers: list[kvtrace.Trace], tmp_path: Path) -> None:
    found = merge(servers, tmp_path / "both.kvtrace")
    olds = [(trace, request) for trace in servers for request in trace.requests()]
    assert [one.request for one in found.requests()] == NEW
    for (trace, old), new in zip(olds, NEW, strict=True):
        assert found.tokens(new).equals(trace.tokens(old.request))
        for layer in range(2):
            own, its = found.layer_data(layer, new), trace.layer_data(layer, old.request)
            for kind in ("q", "k", "v", "lse", "received"):
                one, other = getattr(own, kind), getattr(its, kind)
                assert (one is None) == (other is None)
                np.testing.assert_array_equal(one, other)
        assert found.holdings(new).layers == trace.holdings(old.request).layers
    np.testing.assert_array_equal(found.static("wo", NEW[1]), servers[0].static("wo", 4 * 10**9))
    for name in tables.arrow_schemas():
        if name not in ("runs", "replay_ranks"):
            assert found.table(name).num_rows == sum(t.table(name).num_rows for t in servers), name
    assert found.status == "cut off"
    assert [kvtrace.open(found.path, rank).status for rank in range(3)][:2] == ["complete"] * 2
    assert found.manifest.source == "synthetic"


def test_whose_it_was_is_kept(servers: list[kvtrace.Trace], tmp_path: Path) -> None:
    both = merge(servers, tmp_path / "both.kvtrace")
    # And again, with what came of it.
    with TraceWriter(tmp_path / "c.kvtrace", source="synthetic") as writer:
        write_synthetic(writer, SPECS, [8])
    found = merge([kvtrace.open(writer.path), both], tmp_path / "all.kvtrace")
    origins = [json.loads(text) for text in found.table("runs")["merged_from"].to_pylist()]
    assert [(one["trace"], one["rank"]) for one in origins] == [
        ("c.kvtrace", 0),
        *(("both.kvtrace", rank) for rank in range(3)),
    ]
    earlier = [one["merged_from"] for one in origins[1:]]
    assert [(one["trace"], one["rank"]) for one in earlier] == [
        ("a.kvtrace", 1),
        ("a.kvtrace", 4),
        ("b.kvtrace", 0),
    ]
    assert found.table("runs")["run"].to_pylist() == [0, 1, 2, 3]


def test_replays_come_along(servers: list[kvtrace.Trace], tmp_path: Path) -> None:
    (name,) = servers[0].replays()["replay"].to_pylist()
    found = merge(servers, tmp_path / "both.kvtrace")
    assert sorted(found.replays()["replay"].to_pylist()) == [name, f"{name}-b"]
    for trace, new_name in ((servers[0], name), (servers[1], f"{name}-b")):
        offset = 0 if trace is servers[0] else 2
        for index, old in enumerate(trace.requests()):
            new = NEW[index + offset]
            np.testing.assert_array_equal(
                evicted_at(found, new_name, 1, 1, new), evicted_at(trace, name, 1, 1, old.request)
            )
    # A result says which of the requests it is of, and its regrets find their tokens.
    rows = found.sql(
        "select replay, request from evicted_but_needed where text is not null group by all"
    )
    assert sorted(map(tuple, (row.values() for row in rows.to_pylist()))) == [
        (name, NEW[0]),
        (name, NEW[1]),
        (f"{name}-b", NEW[2]),
    ]
    # What is replayed anew is what was replayed before.
    (again,) = replay(found, ["h2o"], ["50%"], requests=NEW[:2], store=False)
    (before,) = replay(servers[0], ["h2o"], ["50%"], store=False)
    assert (again.hits, again.evictions) == (before.hits, before.evictions)


def test_an_older_result_of_one_rank_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TraceWriter(tmp_path / "old.kvtrace", source="synthetic") as writer:
        write_synthetic(writer, SPECS, [20, 1])
    trace = kvtrace.open(writer.path)
    append = StoreWriter.append

    def older(self: StoreWriter, table: str, values: Any) -> None:
        if table != "replay_ranks":
            append(self, table, values)

    monkeypatch.setattr(StoreWriter, "append", older)
    (result,) = replay(trace, ["h2o"], ["50%"])
    assert not trace.replay(result.id).segments("replay_ranks")
    place = merge([trace], tmp_path / "x.kvtrace").replay(result.id)
    assert place.table("replay_ranks").to_pylist() == [
        {"replay": result.id, "rank": 0, "first_index": 0, "rows": 21}
    ]


def test_what_cannot_be_merged(
    servers: list[kvtrace.Trace], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "both.kvtrace"
    with pytest.raises(InputError, match="was given twice"):
        merge([servers[0], servers[0]], out)
    with TraceWriter(tmp_path / "live.kvtrace", source="synthetic") as writer:
        write_synthetic(writer, SPECS, [5])
        with pytest.raises(TraceError, match="is being recorded"):
            merge([servers[0], kvtrace.open(writer.path)], out)
    for path in servers[1].path.glob("rank-00000/tables/tokens/*"):
        path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(TraceError):
        merge(servers, out)
    # Nothing is left, neither there nor beside it.
    assert {path.name for path in tmp_path.iterdir()} == {
        "a.kvtrace",
        "b.kvtrace",
        "live.kvtrace",
    }
    command = ["merge", str(servers[0].path), "--out", str(out)]
    assert main(command) == 0
    assert "75 rows" not in (said := capsys.readouterr().out)
    assert "53 rows of 2 requests in 2 ranks" in said
    assert "one trace was given" in said
    assert main(command) == 1
    assert "exists; a new path was expected" in capsys.readouterr().err


@given(
    st.dictionaries(st.integers(0, 50), st.integers(0, 50), min_size=1, max_size=5),
    st.data(),
)
def test_numbers_move_with_their_rank(ranks: dict[int, int], data: st.DataObject) -> None:
    pairs = st.tuples(st.sampled_from(sorted(ranks)), st.integers(0, NUMBERS_PER_RANK - 1))
    values = data.draw(st.lists(st.none() | pairs, max_size=8))

    def numbers(of: dict[int, int]) -> list[int | None]:
        return [None if v is None else of[v[0]] * NUMBERS_PER_RANK + v[1] for v in values]

    same = {rank: rank for rank in ranks}
    rows = tables.to_arrow("kv_events", {"block": numbers(same), "step": numbers(same)})
    found = renumbered("kv_events", rows, ranks)
    assert found["block"].to_pylist() == found["step"].to_pylist() == numbers(ranks)
    assert found.schema.equals(rows.schema)


#: Columns of 64 bits that no rank numbers: times, sizes, counts, and ids of others.
PLAIN = {
    *("started_ns", "duration_ns", "ts_ns", "wall_ns", "monotonic_ns", "spread_ns", "created_ns"),
    *("wall_error_ns", "bytes", "count", "num_parameters", "training_step", "content"),
    *("tokens", "measured_rows", "hits", "misses", "evictions", "sinks", "retained_sinks", "ties"),
    *("held", "first_index", "rows", "arrived_ns"),
    *("num_blocks", "bytes_per_block", "swap_blocks"),
}

#: Results of what-ifs, which merging leaves behind.
WHAT_IFS = ("tier_", "allocation_", "block_runs")


def test_every_number_is_known_to_be_a_ranks_or_not() -> None:
    """A column that is added to schema.sql must be said to be one or the other."""
    for column in tables.columns():
        if column.table not in tables.arrow_schemas() or column.table.startswith(WHAT_IFS):
            continue
        if column.type in ("BIGINT", "UBIGINT"):
            owned = is_numbered(column.table, column.name)
            assert owned != (column.name in PLAIN), f"{column.table}.{column.name}"
        if column.name in RANK_COLUMNS:
            assert column.type == "INTEGER"
