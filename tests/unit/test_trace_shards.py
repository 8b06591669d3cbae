"""Ranks that hold different heads of the same tokens are read as one request with all heads.

The keys and queries are synthetic: seeded random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvtrace
from kvtrace.cached import model_kinds
from kvtrace.commands.info import describe
from kvtrace.errors import InputError
from kvtrace.ranks import NUMBERS_PER_RANK
from kvtrace.testing import write_synthetic
from kvtrace.writer import LayerSpec, TraceWriter
from kvtrace_viewer.replay import replay

WHOLE = [LayerSpec(layer, 8, 4, 8, 8, 8**-0.5) for layer in range(2)]
STEPS = (20, 1, 1)


class Shards:
    """Writes what ranks of a tensor-parallel run would: other heads, the same tokens."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "tp.kvtrace"
        self.ranks = 0

    def add(
        self,
        heads: list[int] | None,
        steps: Sequence[int] = STEPS,
        *,
        of: int = 4,
        first_token: int = 0,
    ) -> None:
        count = 2 if heads is None else len(heads)
        specs = [
            replace(
                spec,
                num_q_heads=2 * count,
                num_kv_heads=count,
                kv_heads=None if heads is None else tuple(heads),
                model_kv_heads=of,
            )
            for spec in WHOLE
        ]
        with TraceWriter(
            self.path, source="synthetic", rank=self.ranks, launch="one", dtype="float32"
        ) as writer:
            append = writer.append

            def shifted(table: str, values: Any) -> None:
                if table == "tokens":
                    values = {**values, "token_id": values["token_id"] + first_token}
                append(table, values)

            writer.append = shifted  # type: ignore[method-assign]
            write_synthetic(writer, specs, steps, seed=self.ranks)
        self.ranks += 1

    def open(self, rank: int | None = None) -> kvtrace.Trace:
        return kvtrace.open(self.path, rank)


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    return Shards(tmp_path)


def test_two_ranks_are_one_request_with_all_heads(shards: Shards) -> None:
    shards.add([0, 1])
    shards.add([2, 3])
    trace = shards.open()
    assert trace.shards == {1: 0}
    assert [(one.request, one.tokens) for one in trace.requests()] == [(0, 22)]
    assert (trace.rows, trace.places().rows) == (22, 22)
    assert [(s.num_q_heads, s.num_kv_heads, s.kv_heads) for s in trace.layers] == [(8, 4, None)] * 2
    assert not any(layer.is_part for layer in trace.layers)
    for head in range(8):
        part = shards.open(head // 4)
        own = part.attention(1, head, request=head // 4 * NUMBERS_PER_RANK)
        np.testing.assert_array_equal(trace.attention(1, head), own)
    v = [shards.open(r).layer_data(0, r * NUMBERS_PER_RANK).v for r in (0, 1)]
    found = trace.layer_data(0).v
    assert found is not None
    np.testing.assert_array_equal(found, np.concatenate(v, axis=1))  # type: ignore[arg-type]
    assert set(model_kinds(trace).values()) == {0}


def test_sql_and_replays_are_of_all_heads(shards: Shards) -> None:
    shards.add([0, 1])
    shards.add([2, 3])
    trace = shards.open()
    heads = trace.sql("select request, q_head, kv_head from head_attention where layer = 1")
    assert sorted(map(tuple, map(dict.values, heads.to_pylist()))) == [
        (0, head, head // 2) for head in range(8)
    ]
    (found,) = trace.sql("select mass(5, 1, 7, 0, 6) as m").to_pylist()
    assert found["m"] == pytest.approx(1, abs=1e-5)
    # TOVA averages all heads of a layer: what it keeps needs both ranks.
    (result,) = replay(trace, ["tova"], ["50%"], "step")
    assert result.tokens == 22
    assert result.evicted_at.shape == (22, 2, 4)


def test_a_missing_rank_is_said(shards: Shards) -> None:
    shards.add([0, 1])
    shards.add([4, 5], of=6)
    whole = describe(shards.open())
    assert whole["heads"] == "KV heads 0-1 of the model's 4"
    # Another model: not joined.
    assert [rank["joined_with"] for rank in whole["ranks"]] == [None, None]
    alone = describe(shards.open(1))
    assert alone["heads"] == "KV heads 4-5 of the model's 6"


def test_three_of_four_are_joined_and_not_called_all(shards: Shards) -> None:
    for head in (0, 1, 3):
        shards.add([head])
    trace = shards.open()
    assert [one.kv_head_numbers for one in trace.layers] == [[0, 1, 3]] * 2
    assert all(layer.is_part for layer in trace.layers)
    assert describe(trace)["heads"] == "KV heads 0-1,3 of the model's 4"
    with pytest.raises(InputError, match="head 4 was not found in layer 0; it has 0-3,6-7"):
        trace.attention(0, 4)


def test_what_is_not_known_to_belong_together_is_left_apart(shards: Shards) -> None:
    shards.add(None)
    shards.add(None)
    trace = shards.open()
    assert (trace.shards, len(trace.requests())) == ({}, 2)
    assert describe(trace)["heads"] == "2 of 4 KV heads of the model, not known which"


def test_data_parallel_pairs_stay_apart(shards: Shards) -> None:
    # The same prompt in both pairs.
    for heads in ([0, 1], [2, 3], [0, 1], [2, 3]):
        shards.add(heads)
    trace = shards.open()
    assert trace.shards == {1: 0, 3: 2}
    assert [one.request for one in trace.requests()] == [0, 2 * NUMBERS_PER_RANK]


def test_other_tokens_are_other_requests(shards: Shards) -> None:
    shards.add([0, 1])
    shards.add([2, 3], first_token=1)
    trace = shards.open()
    assert (trace.shards, len(trace.requests())) == ({}, 2)
    assert describe(trace)["heads"] == "KV heads 0-1 of the model's 4"


def test_a_rank_that_lags_holds_the_others_back(shards: Shards) -> None:
    shards.add([0, 1])
    shards.add([2, 3], [20])
    trace = shards.open()
    assert (trace.rows, trace.requests()[0].tokens) == (20, 20)
    assert trace.attention(0, 7).shape == (20, 20)


def test_asking_for_the_other_ranks_request_says_where_it_is(shards: Shards) -> None:
    shards.add([0, 1])
    shards.add([2, 3])
    with pytest.raises(InputError, match="ask for request 0, or open the trace with rank=1"):
        shards.open().attention(0, 7, request=NUMBERS_PER_RANK)


def test_the_form_says_what_is_recorded(shards: Shards) -> None:
    shards.add([2, 3])
    rows: list[dict[str, Any]] = shards.open().table("layers").to_pylist()
    assert [(row["kv_heads"], row["model_kv_heads"]) for row in rows] == [([2, 3], 4)] * 2
