"""Log-sum-exp in row blocks against the plain definition; inputs are synthetic."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from kvtrace.writer import LayerSpec
from kvtrace_recorder import lse
from kvtrace_recorder.lse import KeyHistory, row_lse
from kvtrace_recorder.messages import finite_float16

TOKENS, Q_HEADS, KV_HEADS, WIDTH = 37, 6, 2, 8


def synthetic() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    q = rng.normal(size=(TOKENS, Q_HEADS, WIDTH)).astype(np.float32)
    return q, rng.normal(size=(TOKENS, KV_HEADS, WIDTH)).astype(np.float32)


def naive(
    q: np.ndarray[Any, Any],
    k: np.ndarray[Any, Any],
    spec: LayerSpec,
    sinks: np.ndarray[Any, Any] | None,
) -> np.ndarray[Any, Any]:
    found = np.empty((TOKENS, Q_HEADS))
    for row in range(TOKENS):
        last = TOKENS if spec.attention_kind == "bidirectional" else row + 1
        first = 0 if spec.sliding_window is None else max(0, row + 1 - spec.sliding_window)
        for head in range(Q_HEADS):
            keys = k[first:last, head // (Q_HEADS // KV_HEADS)].astype(float)
            scores = keys @ q[row, head].astype(float) * spec.scale
            if spec.softcap is not None:
                scores = spec.softcap * np.tanh(scores / spec.softcap)
            if spec.alibi_slopes is not None:
                scores += spec.alibi_slopes[head] * (np.arange(first, last) - row)
            if spec.position_bias is not None:
                # Five numbers: distances -2 to 2.
                at = [min(2, max(-2, key - row)) + 2 for key in range(first, last)]
                scores += np.array(spec.position_bias[head])[at]
            total = np.exp(scores).sum() + (0 if sinks is None else np.exp(sinks[head]))
            found[row, head] = np.log(total)
    return found


SPECS: list[tuple[dict[str, Any], bool]] = [
    ({}, False),
    ({"sliding_window": 5, "attention_kind": "sliding"}, False),
    ({"softcap": 1.5}, False),
    ({"attention_kind": "bidirectional"}, False),
    ({"alibi_slopes": (0.5, 0.25, 0.125, 0.7, 0.01, 0.0)}, False),
    ({"alibi_slopes": (0.5, 0.25, 0.125, 0.7, 0.01, 0.0), "softcap": 1.5}, True),
    ({"position_bias": ((0.5, -1.0, 0.25, 2.0, 1.0),) * 5 + ((3.0, 1.0, 0.0, -1.0, 2.0),)}, False),
    ({"position_bias": ((1.0, 2.0, 3.0, 4.0, 5.0),) * 6, "attention_kind": "bidirectional"}, True),
    ({"sliding_window": 9, "attention_kind": "sliding"}, True),
]


@pytest.mark.parametrize(("options", "has_sinks"), SPECS)
@pytest.mark.parametrize("held", [lse.SCORES, 1000, 1])
def test_blocks_equal_the_definition(
    options: dict[str, Any],
    has_sinks: bool,
    held: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lse, "SCORES", held)
    q, k = synthetic()
    spec = LayerSpec(0, Q_HEADS, KV_HEADS, WIDTH, WIDTH, 0.7, has_sinks=has_sinks, **options)
    sinks = np.linspace(-1, 2, Q_HEADS, dtype=np.float32) if has_sinks else None
    expected = naive(q, k, spec, sinks)
    history = KeyHistory()
    history.extend(k)
    at = np.arange(TOKENS)
    np.testing.assert_allclose(row_lse(q, history, at, spec, sinks), expected, atol=2e-6)
    some = at[[0, 3, 4, 29, TOKENS - 1]]
    found = row_lse(q[some], history, some, spec, sinks)
    np.testing.assert_allclose(found, expected[some], atol=2e-6)
    if spec.attention_kind == "bidirectional":
        return
    stepwise = KeyHistory()
    stepwise.extend(k[:30])
    for row in range(30, TOKENS):
        stepwise.extend(k[row : row + 1])
        found = row_lse(q[row : row + 1], stepwise, at[row : row + 1], spec, sinks)
        np.testing.assert_allclose(found, expected[row : row + 1], atol=2e-6)


def test_key_history_grows_by_doubling_and_keeps_every_key() -> None:
    _, k = synthetic()
    history = KeyHistory()
    moves = 0
    for _ in range(12):
        before = history.keys
        history.extend(k.astype(np.float16))
        moves += not np.shares_memory(before, history.keys)
    assert history.tokens == 12 * TOKENS
    assert moves == 1 + math.ceil(math.log2(12 * TOKENS / max(lse.ROOM, TOKENS)))
    expected = np.concatenate([k] * 12).astype(np.float16).transpose(1, 0, 2)
    np.testing.assert_array_equal(history.keys, expected)


def test_float16_overflow_is_clipped_and_counted() -> None:
    with np.errstate(over="ignore"):
        values = np.array([1.0, 7e4, -1e9, np.nan, 65504.0]).astype(np.float16)
    clipped, count = finite_float16(values)
    assert count == 2
    np.testing.assert_array_equal(clipped, [1, 65504, -65504, np.nan, 65504])
    same, count = finite_float16(clipped)
    assert (same is clipped, count) == (True, 0)
    wide = np.array([1e9], np.float32)
    assert finite_float16(wide) == (wide, 0)
