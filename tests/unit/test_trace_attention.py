from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvtrace import InputError
from kvtrace.attention import Float
from kvtrace.testing import SyntheticTrace
from kvtrace.writer import LayerSpec

SPECS = {
    "gqa": LayerSpec(0, 4, 2, 16, 16, 0.25),
    "sliding": LayerSpec(0, 2, 2, 16, 16, 0.25, attention_kind="sliding", sliding_window=9),
    "softcap": LayerSpec(0, 2, 1, 16, 16, 0.5, softcap=2.0),
    "alibi": LayerSpec(0, 4, 2, 16, 16, 0.25, alibi_slopes=(0.5, 0.25, 0.1, 0.0)),
    "bidirectional": LayerSpec(0, 2, 2, 16, 16, 0.25, attention_kind="bidirectional"),
}


def naive(q: Float, k: Float, spec: LayerSpec, head: int) -> Float:
    """Softmax of one head, in float64, cell by cell."""
    n = len(q)
    found = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            score = float(q[i].astype(np.float64) @ k[j]) * spec.scale
            if spec.softcap:
                score = spec.softcap * np.tanh(score / spec.softcap)
            if spec.alibi_slopes:
                score += spec.alibi_slopes[head] * (j - i)
            found[i, j] = np.exp(score)
            if spec.attention_kind != "bidirectional" and j > i:
                found[i, j] = 0
            if spec.sliding_window and i - j >= spec.sliding_window:
                found[i, j] = 0
    found /= found.sum(axis=1, keepdims=True)
    return found


@pytest.mark.parametrize("name", SPECS)
def test_attention_is_the_softmax(synthetic_trace: SyntheticTrace, name: str) -> None:
    spec = SPECS[name]
    trace = synthetic_trace(specs=[spec], steps=[30, 1, 1])
    data = trace.layer_data(0)
    assert data.q is not None
    assert data.k is not None
    for head in range(spec.num_q_heads):
        kv_head = head // (spec.num_q_heads // spec.num_kv_heads)
        want = naive(data.q[:, head], data.k[:, kv_head], spec, head)
        np.testing.assert_allclose(trace.attention(0, head), want, atol=1e-5)


def test_a_tile_is_a_part_of_the_whole(synthetic_trace: SyntheticTrace) -> None:
    trace = synthetic_trace(steps=[50, 1])
    whole = trace.attention(1, 3)
    assert np.array_equal(trace.attention(1, 3, slice(10, 30), slice(5, 12)), whole[10:30, 5:12])
    rows, keys = np.array([50, 3, 3]), np.array([0, 49])
    assert np.array_equal(trace.attention(1, 3, rows, keys), whole[np.ix_(rows, keys)])
    assert trace.attention(1, 3, slice(0, 0)).shape == (0, 51)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 7, "head": 0}, "layer 7 was not found"),
        ({"layer": 0, "head": 4}, "head 4 was not found in layer 0; it has 0-3"),
        ({"layer": 0, "head": 0, "request": 5}, "request 5 was not found"),
        ({"layer": 0, "head": 0, "rows": np.array([99])}, "the request has 0 to 42"),
    ],
)
def test_what_is_not_there_is_named(
    synthetic_trace: SyntheticTrace, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        synthetic_trace().attention(**arguments)
