"""Which layers, heads, queries and bytes are kept: what the user may write."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvtrace.errors import InputError
from kvtrace.model import number_text
from kvtrace_recorder.selection import Queries, parse_selection


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
    assert Queries().of(0, 5).all()
    assert np.flatnonzero(Queries(last=2).of(0, 5)).tolist() == [3, 4]
    assert Queries(last=9).of(0, 5).all()
    assert np.flatnonzero(Queries(every=4).of(0, 7)).tolist() == [0, 4, 6]
    # A prompt that comes in parts: positions go on, and the last of each part is kept.
    assert np.flatnonzero(Queries(every=4).of(7, 4)).tolist() == [1, 3]
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
