"""Which layers, heads, queries and bytes are kept: what the user may write."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvtrace.errors import InputError
from kvtrace.model import number_text
from kvtrace.writer import LayerSpec
from kvtrace_recorder.messages import Gap
from kvtrace_recorder.selection import Queries, parse_selection
from kvtrace_recorder.session.keeping import Keeper, Plan
from kvtrace_recorder.taps.guard import UnrecordableError


def test_numbers_are_ranges_or_sequences() -> None:
    assert parse_selection(layers="0,4-7").layers == frozenset({0, 4, 5, 6, 7})
    assert parse_selection(layers=[3, 1]).layers == frozenset({1, 3})
    assert parse_selection(heads="2, 0").heads == (0, 2)
    assert parse_selection().layers is None
    assert number_text([0, 4, 5, 6, 7]) == "0,4-7"


def test_bytes_have_units() -> None:
    assert parse_selection().max_bytes == 4 << 30
    assert parse_selection(max_bytes="1.5MiB").max_bytes == 3 << 19
    assert parse_selection(max_bytes="2 GB").max_bytes == 2_000_000_000
    assert parse_selection(max_bytes="10k").max_bytes == 10 << 10
    assert parse_selection(max_bytes=77).max_bytes == 77
    assert parse_selection(max_bytes=None).max_bytes is None
    assert parse_selection(max_bytes="none").max_bytes is None


def test_queries_of_a_prompt() -> None:
    assert Queries().of(0, 5, 5).all()
    assert np.flatnonzero(Queries(last=2).of(0, 5, 5)).tolist() == [3, 4]
    assert Queries(last=9).of(0, 5, 5).all()
    assert np.flatnonzero(Queries(every=4).of(0, 7, 7)).tolist() == [0, 4, 6]
    # A prompt that comes in two parts, and the tokens after it.
    assert np.flatnonzero(Queries(last=2).of(7, 5, 10)).tolist() == [1, 2, 3, 4]
    assert np.flatnonzero(Queries(every=4).of(7, 5, 11)).tolist() == [1, 3, 4]
    assert np.flatnonzero(Queries(every=4, last=3).of(0, 9, 9)).tolist() == [8]
    assert str(parse_selection(queries="every=4").queries) == "every=4"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"layers": "7-4"}, "layers is '7-4'; numbers from 0 and ranges were expected"),
        ({"heads": "-1"}, "heads is '-1'"),
        ({"layers": []}, "layers is empty"),
        ({"queries": "last=0"}, "queries is 'last=0'; all, last=N or every=N was expected"),
        ({"queries": "some"}, "write --queries last=64"),
        ({"max_bytes": "4 parsecs"}, "max-bytes is '4 parsecs'"),
        ({"max_bytes": 0}, "max-bytes is 0"),
    ],
)
def test_anything_else_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_selection(**asked)


def test_the_selection_goes_into_the_trace_as_plain_values() -> None:
    found = parse_selection("0-1", [3], "last=64", "1KiB").to_json()
    assert found == {"layers": [0, 1], "heads": [3], "queries": "last=64", "max_bytes": 1024}


SPECS = {layer: LayerSpec(layer, 4, 2, 16, 16, 0.25) for layer in range(8)}
#: Bytes of a row in float16: q and lse 144, k and v 64 each, in 8 layers, and the tables' 64.
ROW = 64 + 8 * (144 + 64 + 64)


class Recorded:
    """Steps of a prompt of 100 tokens, planned one after the other."""

    def __init__(self, max_bytes: int | None, detail: str = "qkv", queries: str = "all") -> None:
        self.gaps: list[Gap] = []
        selection = parse_selection(queries=queries, max_bytes=max_bytes)
        self._keeper = Keeper(selection, detail=detail, dtype="float16", note=self.gaps.append)

    def step(self, tokens: int = 100) -> Plan:
        plan, _ = self._keeper.plan(
            SPECS, tokens, lambda queries: int(queries.of(0, tokens, tokens).sum())
        )
        return plan


def test_what_fits_is_kept_whole() -> None:
    run = Recorded(2 * 1000 * ROW)
    plans = [run.step() for _ in range(10)]
    assert {plan.kinds for plan in plans} == {frozenset("qkv")}
    assert all(plan.queries.is_all and not plan.sums for plan in plans)
    assert not run.gaps
    assert Recorded(None).step(10**9).kinds == frozenset("qkv")
    assert Recorded(10, "events").step().kinds == frozenset()


def test_thinning_follows_the_rule_and_is_noted_once_each() -> None:
    run = Recorded(100 * ROW * 8)
    plans: list[Plan] = []
    full = ""
    while not full:
        try:
            plans.append(run.step())
        except UnrecordableError as error:
            full = str(error)
    assert "holds its max_bytes, 1.7 MiB before compression" in full
    kept = [plan.layers(list(SPECS)) for plan in plans]
    # Half of it whole, then without the early queries, then without values, then fewer layers.
    assert sum(plan.queries.is_all for plan in plans) == 4
    assert [plan.kinds for plan in plans] == sorted(
        (plan.kinds for plan in plans), key=len, reverse=True
    )
    assert kept == sorted(kept, key=len, reverse=True)
    assert [list(x) for x in dict.fromkeys(map(tuple, kept))] == [
        list(range(8)),
        [0, 2, 4, 6, 7],
        [0, 4, 7],
        [0, 7],
    ]
    assert [(gap.what, gap.count) for gap in run.gaps] == [
        ("prompt queries", 36),
        ("layers' v", 8),
        ("layers", 3),
        ("layers", 2),
        ("layers", 1),
    ]
    assert "only the last 64 of a prompt's are kept" in run.gaps[0].reason
    with pytest.raises(UnrecordableError):
        run.step(1)


def test_a_step_too_large_for_its_level_is_kept_at_the_next() -> None:
    # Whole the step is 100 of 130 rows' bytes, above half; 87 without 36 queries, below 3/4.
    run = Recorded(130 * ROW)
    plan = run.step()
    assert (str(plan.queries), plan.kinds, plan.sums) == ("last=64", frozenset("qkv"), True)
    every = Recorded(60 * ROW, queries="every=2").step()
    assert (str(every.queries), every.kinds) == ("last=64,every=2", frozenset("qk"))
    assert Recorded(130 * ROW, queries="last=10").step().kinds == frozenset("qkv")


def test_the_estimate_is_the_arrays_bytes() -> None:
    plan = Plan(frozenset("qkv"), Queries())
    assert plan.nbytes(SPECS, 3, 3, 2) == 3 * ROW
    some = Plan(frozenset("qk"), Queries(last=1), halvings=1)
    assert some.nbytes(SPECS, 3, 1, 4) == 3 * 64 + 5 * (3 * 128 + 4 * 68 + 3 * 16)
