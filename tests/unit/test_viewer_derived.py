"""Encoding, shrinking and marks, on synthetic maps whose answers are known."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvtrace.bytes_cache import BytesCache
from kvtrace.head_map import HeadMap
from kvtrace.marks import find_marks
from kvtrace.model import Layer, LayerData
from kvtrace_viewer.derived import tiles
from kvtrace_viewer.derived.cells import cell
from kvtrace_viewer.derived.encode import LOG_FLOOR, SCALES, encode
from kvtrace_viewer.derived.pooling import pool, sample

Weights = NDArray[np.float32]


class SyntheticMap:
    """A map held whole: NaN above the diagonal, rows that sum to 1."""

    def __init__(self, weights: NDArray[Any]) -> None:
        self.weights = weights.astype(np.float32).copy()
        self.num_tokens = self.num_keys = len(weights)
        self.weights[np.triu_indices(self.num_tokens, 1)] = np.nan
        self.rows_read = 0

    def visible_stop(self, last_row: int) -> int:
        return last_row + 1

    def block(self, rows: NDArray[np.int64], key_start: int, key_stop: int) -> Weights:
        self.rows_read += len(rows)
        return self.weights[rows, key_start:key_stop].copy()


def uniform_map(num_tokens: int, planted: dict[int, float]) -> SyntheticMap:
    """Uniform attention, but the keys given get the share given of every later query."""
    weights = np.zeros((num_tokens, num_tokens), np.float32)
    for row in range(num_tokens):
        here = {key: share for key, share in planted.items() if key < row}
        rest = 1 - sum(here.values())
        weights[row, : row + 1] = rest / (row + 1 - len(here))
        for key, share in here.items():
            weights[row, key] = share
    return SyntheticMap(weights)


def head_of(source: SyntheticMap) -> HeadMap:
    """The same map from queries and keys: with q = ln(weights) and k = 1 scores are its logs."""
    n = source.num_tokens
    spec = Layer(0, 0, "full", 1, 1, n, n, 1.0, None, None, False, None, 0, 0)
    q = np.log(np.nan_to_num(source.weights) + 1e-30)[:, None]
    k = np.eye(n, dtype=np.float32)[:, None]
    return HeadMap(LayerData(spec, q, k, None, np.zeros((n, 1), np.float32)), 0)


@pytest.mark.parametrize("scale", SCALES)
def test_codes_rise_with_the_weight_and_spare_zero_for_what_is_not_visible(scale: str) -> None:
    weights = np.array([np.nan, 0, LOG_FLOOR, 1e-4, 1e-2, 0.3, 1], np.float32)
    codes = encode(weights, scale)
    assert codes[0] == 0
    assert codes[1] == 1
    assert codes[-1] == 255
    assert np.all(np.diff(codes[1:].astype(int)) >= 0)


def test_a_tile_of_level_0_shows_every_pair() -> None:
    source = uniform_map(40, {3: 0.5})
    planes = np.frombuffer(tiles.tile(source, 0, 0, 0, "linear"), np.uint8).reshape(2, 256, 256)
    want = encode(source.weights, "linear")
    for plane in planes:
        assert np.array_equal(plane[:40, :40], want)
        assert not plane[40:].any()
        assert not plane[:, 40:].any()


@settings(max_examples=60, deadline=None)
@given(
    total=st.integers(1, 90),
    level=st.integers(0, 4),
    tile=st.integers(0, 2),
    seed=st.integers(0, 9),
)
def test_shrinking_equals_the_naive_maximum_and_mean(
    total: int, level: int, tile: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    source = SyntheticMap(rng.random((total, total)))
    size = 1 << level
    edges = np.minimum((tile * 8 + np.arange(9)) * size, total).astype(np.int64)
    got = pool(source, edges, edges, max_rows_per_cell=64)
    for row in range(8):
        for column in range(8):
            part = source.weights[edges[row] : edges[row + 1], edges[column] : edges[column + 1]]
            part = part[~np.isnan(part)]
            assert np.isnan(got.largest[row, column]) == (part.size == 0)
            if part.size:
                assert got.largest[row, column] == part.max()
                assert got.mean[row, column] == pytest.approx(part.mean(dtype=np.float64), rel=1e-6)


def test_a_single_hot_key_survives_any_shrinking() -> None:
    total = 1024
    weights = np.full((total, total), 1e-6, np.float32)
    weights[:, 517] = 0.9
    source = SyntheticMap(weights)
    planes = np.frombuffer(tiles.tile(source, 6, 0, 0, "linear"), np.uint8).reshape(2, 256, 256)
    column, first_row = 517 >> 6, (517 >> 6) + 1
    assert np.all(
        planes[0, first_row : total >> 6, column] == encode(np.array([0.9], np.float32), "linear")
    )
    assert planes[1, first_row, column] < planes[0, first_row, column]


def test_long_cells_read_a_sample_of_their_rows_and_always_the_last() -> None:
    assert list(sample(10, 14, 8)) == [10, 11, 12, 13]
    thinned = sample(0, 1000, 8)
    assert len(thinned) == 8
    assert thinned[-1] == 999
    source = SyntheticMap(np.ones((2048, 2048)))
    tiles.tile(source, 8, 0, 0, "sqrt")
    assert source.rows_read == 8 * tiles.TILE_ROWS_PER_CELL


@pytest.mark.parametrize("total", [200, 600, 1500])
def test_planted_sinks_and_heavy_hitters_are_found_at_any_length(total: int) -> None:
    marks = find_marks(head_of(uniform_map(total, {0: 0.4, 7: 0.05})))
    assert [(mark.kind, mark.position) for mark in marks][:1] == [("sink", 0)]
    assert marks[0].strength == pytest.approx(0.4, abs=1e-3)
    heavy = {mark.position for mark in marks if mark.kind == "heavy"}
    assert heavy == ({7} if total >= 600 else set())


def test_uniform_attention_has_no_marks() -> None:
    assert find_marks(head_of(uniform_map(300, {}))) == []
    assert find_marks(head_of(SyntheticMap(np.zeros((0, 0))))) == []


def test_the_cache_stays_in_bounds_and_makes_a_value_once() -> None:
    cache: BytesCache[bytes] = BytesCache(100, len)
    made: list[int] = []

    def make() -> bytes:
        made.append(1)
        return b"x" * 40

    threads = [threading.Thread(target=cache.get, args=("one", make)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    for key in range(5):
        cache.get(key, make)
    assert cache.num_bytes <= 100
    assert cache.get("huge", lambda: b"x" * 1000) == b"x" * 1000
    assert cache.num_bytes <= 100


def test_a_failed_value_is_not_kept() -> None:
    cache: BytesCache[bytes] = BytesCache(100, len)

    def fail() -> bytes:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.get("key", fail)
    assert cache.get("key", lambda: b"yes") == b"yes"


def test_cells_survive_json_without_changing() -> None:
    assert cell(2**53 - 1) == 2**53 - 1
    assert cell(2**63) == str(2**63)
    assert cell(float("nan")) == "nan"
    assert cell(0.5) == 0.5
    assert cell(None) is None
    assert cell([1, 2]) == "[1, 2]"
    assert cell(True) is True
