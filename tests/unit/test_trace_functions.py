"""SQL functions over the arrays: equal to Trace.attention, and run for surviving rows only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvtrace
from kvtrace.errors import QueryError
from kvtrace.functions import ArrayFunctions
from kvtrace.testing import SyntheticTrace, write_synthetic
from kvtrace.writer import LayerSpec, TraceWriter

SPECS = [
    LayerSpec(0, 4, 2, 16, 16, 0.5),
    LayerSpec(1, 4, 2, 16, 16, 0.5, attention_kind="sliding", sliding_window=10),
    LayerSpec(2, 4, 2, 16, 16, 0.5, attention_kind="bidirectional"),
]


def column(trace: kvtrace.Trace, query: str) -> list[Any]:
    return list(trace.sql(query).column(0).to_pylist())


def test_attention_and_mass_are_those_of_the_trace(synthetic_trace: SyntheticTrace) -> None:
    trace = synthetic_trace(specs=SPECS)
    for layer in range(3):
        for head in (0, 3):
            whole = trace.attention(layer, head)
            # Rows out of order, in one call with another head's.
            asked = f"attention(row, {layer}, {head}) from rows order by hash(row), row"
            order = column(trace, "select row from rows order by hash(row), row")
            for row, found in zip(order, column(trace, f"select {asked}"), strict=True):
                stop = trace.rows if layer == 2 else row + 1
                np.testing.assert_array_equal(np.array(found, np.float32), whole[row, :stop])
            masses = column(
                trace, f"select mass(row, {layer}, {head}, 2, row // 2) from rows order by row"
            )
            wanted = [whole[row, 2 : max(2, row // 2)].sum() for row in range(trace.rows)]
            np.testing.assert_allclose(masses, wanted, rtol=1e-5, atol=1e-7)


def test_vectors_are_those_that_were_recorded(synthetic_trace: SyntheticTrace) -> None:
    trace = synthetic_trace(specs=SPECS)
    data = trace.layer_data(1)
    for name, array, head in (
        ("queries", data.q, 3),
        ("keys", data.k, 1),
        ("kv_values", data.v, 1),
    ):
        assert array is not None
        found = column(trace, f"select {name}(row, 1, {head}) from rows order by row")
        np.testing.assert_array_equal(np.array(found, np.float32), array[:, head])


def test_only_rows_that_the_filter_leaves_are_computed(
    synthetic_trace: SyntheticTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = synthetic_trace(steps=[3000, 1], specs=SPECS[:1])
    asked: list[int] = []
    genuine = ArrayFunctions.attention

    def counting(self: ArrayFunctions, row: Any, layer: Any, head: Any) -> Any:
        asked.extend(row.to_pylist())
        return genuine(self, row, layer, head)

    monkeypatch.setattr(ArrayFunctions, "attention", counting)
    query = (
        "select len(attention(r.row, 0, 0)) from rows r join steps s using (step)"
        " where s.phase = 'decode' or r.position in (5, 2900) order by 1"
    )
    assert column(trace, query) == [6, 2901, 3001]
    assert sorted(asked) == [5, 2900, 3000]


def test_what_is_not_there_is_null(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "x.kvtrace", source="synthetic") as writer:
        write_synthetic(writer, SPECS[:1], [8, 1])
        # Position 8 again, after a crop, and without its query.
        writer.add_fork(0, 0, 8)
        writer.append("steps", {"step": [2], "model": [0], "phase": ["decode"]})
        row: dict[str, list[Any]] = {"row": [9], "step": [2], "request": [0], "position": [8]}
        writer.append("rows", {**row, "has_query": [False]})
        ones = np.ones((1, 2, 16), np.float32)
        empty = {"q": np.zeros((0, 4, 16), np.float32), "lse": np.zeros((0, 4), np.float32)}
        writer.append_layer(0, 0, k=ones, v=ones, **empty)
    trace = kvtrace.open(writer.path)
    asked = "select {} is null from (from rows union all select 77, 0, 0, 0, true) order by row"
    gone = [False] * 8 + [True, True, True]
    assert column(trace, asked.format("attention(row, 0, 0)")) == gone
    assert column(trace, asked.format("mass(row, 0, 0, 0, 4)")) == gone
    # The key of the last row is there all the same.
    assert column(trace, asked.format("keys(row, 0, 0)")) == [*gone[:9], False, True]
    assert column(trace, "select attention(null, 0, 0) is null") == [True]
    assert column(trace, "select mass(1, 0, 0, null, 4) is null") == [True]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("attention(1, 9, 0)", "layer 9 was not found in request 0"),
        ("attention(1, 0, 9)", "head 9 was not found in layer 0; it has 0-3"),
        ("keys(1, 0, 2)", "KV head 2 was not found in layer 0; it has 0-1"),
    ],
)
def test_a_wrong_number_is_a_line_of_ours(
    synthetic_trace: SyntheticTrace, call: str, message: str
) -> None:
    with pytest.raises(QueryError, match=rf"^{message}"):
        synthetic_trace(specs=SPECS).sql(f"select {call} from rows where row = 1")


def test_rows_of_a_trace_that_grows_are_known(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "x.kvtrace", source="synthetic")
    write_synthetic(writer, SPECS[:1], [20, 1])
    trace = kvtrace.open(writer.path)
    assert column(trace, "select max(len(attention(row, 0, 0))) from rows") == [21]
    writer.close()
