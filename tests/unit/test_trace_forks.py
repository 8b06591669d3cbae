"""Requests whose rows are not only their own: crops, reordered beams, shared prefixes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvtrace
from kvtrace import InputError
from kvtrace.sequences import Fork, Sequences, rows_by_request
from kvtrace.writer import LayerSpec, TraceWriter

SPEC = LayerSpec(0, 2, 1, 8, 8, 0.5)
REQUESTS = 4

#: A step: either rows of some requests, or forks that happen at once, one a request at most.
_rows = st.lists(st.tuples(st.integers(0, REQUESTS - 1), st.integers(1, 5)), min_size=1, max_size=3)
_forks = st.dictionaries(
    st.integers(0, REQUESTS - 1),
    st.tuples(st.integers(0, REQUESTS - 1), st.integers(0, 12)),
    min_size=1,
)
_steps = st.lists(st.one_of(_rows, _forks), max_size=25)


def naive(steps: list[Any]) -> tuple[dict[int, list[int]], list[tuple[int, int, int]], list[Fork]]:
    """Lists of rows by request, the columns of table `rows`, and table `forks`."""
    held: dict[int, list[int]] = {number: [] for number in range(REQUESTS)}
    rows: list[tuple[int, int, int]] = []
    forks: list[Fork] = []
    forked_at = -1
    for step in steps:
        if isinstance(step, dict):
            if forked_at == len(rows):
                continue  # Forks of one row are one event.
            forked_at = len(rows)
            before = {number: list(found) for number, found in held.items()}
            for request, (source, tokens) in step.items():
                held[request] = before[source][:tokens]
                forks.append(Fork(len(rows), request, source, tokens))
        else:
            for request, count in step:
                for _ in range(count):
                    rows.append((len(rows), request, len(held[request])))
                    held[request].append(len(rows) - 1)
    return held, rows, forks


@given(_steps, st.randoms(use_true_random=False))
def test_rows_equal_those_of_lists(steps: list[Any], order: Any) -> None:
    held, rows, forks = naive(steps)
    order.shuffle(rows)
    order.shuffle(forks)
    columns = np.array(rows, np.int64).reshape(-1, 3)
    found = rows_by_request(columns[:, 0], columns[:, 1], columns[:, 2], forks)
    assert {n: list(x) for n, x in found.items()} == {n: x for n, x in held.items() if x}
    assert list(found) == sorted(found)


@given(_steps)
def test_sequences_grow_as_lists_do(steps: list[Any]) -> None:
    held, rows, forks = naive(steps)
    sequences = Sequences()
    by_row = {at: [fork for fork in forks if fork.row == at] for at in {f.row for f in forks}}
    for row, request, _ in rows:
        sequences.fork(by_row.pop(row, []))
        sequences.extend(request, np.array([row]))
    sequences.fork([fork for rest in by_row.values() for fork in rest])
    assert all(list(sequences.rows(n)) == held[n] for n in range(REQUESTS))


def write(writer: TraceWriter, model: int, step: int, parts: list[tuple[int, int, int]]) -> None:
    """One step of (request, first position, rows); every array holds the number of its row."""
    requests = np.concatenate([np.full(n, request) for request, _, n in parts])
    positions = np.concatenate([np.arange(first, first + n) for _, first, n in parts])
    n = len(requests)
    row = np.arange(writer.rows, writer.rows + n)
    common = {"request": requests, "position": positions, "row": row}
    writer.append("steps", {"step": [step], "model": [model]})
    writer.append("rows", {**common, "step": np.full(n, step), "has_query": np.ones(n, bool)})
    writer.append("tokens", {**common, "token_id": 100 + row, "source": ["prompt"] * n})
    values = np.broadcast_to(row.astype(np.float32)[:, None, None], (n, 2, 8))
    layer = {"q": values, "k": values[:, :1], "v": values[:, :1], "lse": values[:, :, 0]}
    writer.append_layer(model, 0, **layer)


@pytest.fixture
def forked(tmp_path: Path) -> kvtrace.Trace:
    """Beams 0 and 1 that swap, 0 cropped and continued, and 2 that is all a prefix of 1."""
    with TraceWriter(tmp_path / "a.kvtrace", source="synthetic", dtype="float32") as writer:
        model = writer.add_model(name="synthetic")
        writer.add_layers(model, [SPEC])
        writer.append("requests", {"request": [0, 1, 2, 3], "model": [model] * 4})
        write(writer, model, 0, [(0, 0, 3), (1, 0, 2)])
        writer.add_fork(0, 1, 2)
        writer.add_fork(1, 0, 3)
        write(writer, model, 1, [(0, 2, 1), (1, 3, 1)])
        writer.add_fork(0, 0, 1)
        writer.add_fork(2, 1, 3)
        write(writer, model, 2, [(0, 1, 2)])
        writer.add_fork(3, 3, 0)
    return kvtrace.open(tmp_path / "a.kvtrace")


def test_a_trace_follows_its_forks(forked: kvtrace.Trace) -> None:
    want = {0: [3, 7, 8], 1: [0, 1, 2, 6], 2: [0, 1, 2]}
    assert {r.request: r.tokens for r in forked.requests()} == {n: len(x) for n, x in want.items()}
    for request, rows in want.items():
        assert forked.request_rows(request).tolist() == rows
        tokens = forked.tokens(request)
        assert tokens["token_id"].to_pylist() == [100 + row for row in rows]
        assert tokens["position"].to_pylist() == list(range(len(rows)))
        assert tokens.column_names == ["position", "token_id", "text", "source"]
        data = forked.layer_data(0, request)
        assert data.k is not None
        np.testing.assert_array_equal(data.k[:, 0, 0], rows)
    for ask in (forked.request_rows, forked.tokens):
        with pytest.raises(InputError, match="request 3 was not found"):
            ask(3)


def test_tokens_of_a_trace_without_row_numbers_are_found_by_position(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "a.kvtrace", source="synthetic") as writer:
        model = writer.add_model(name="synthetic")
        writer.add_layers(model, [SPEC])
        writer.append("requests", {"request": [0], "model": [model]})
        write(writer, model, 0, [(0, 0, 2)])
        # As an older version wrote them.
        writer.append("tokens", {"request": [0], "position": [2], "token_id": [7]})
    found = kvtrace.open(tmp_path / "a.kvtrace").tokens(0)
    assert found["token_id"].to_pylist() == [100, 101, 7]
