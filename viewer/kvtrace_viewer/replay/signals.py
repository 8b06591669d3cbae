"""Signals beyond q, k and v, read or derived once and only where a policy declares them.

`q_prerope`: the queries before RoPE, imported or turned back from q; with them come the rotation
frequencies. `wo`: the output projections. `score`: a score that was recorded with the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace.model import Layer
from kvtrace.ranks import NUMBERS_PER_RANK
from kvtrace.rope import Rope, ropes
from kvtrace.trace import Trace

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

EXTRA = ("q_prerope", "wo", "score")


@dataclass(frozen=True, eq=False)
class Extra:
    """The declared signals of one layer of one request; None where not declared.

    Attributes
    ----------
    q_prerope : float32 [token, query head, head_dim]
        Queries before RoPE.
    inv_freq : float64 [head_dim / 2]
        Radians that RoPE turns (dimension i, i + head_dim / 2) by per position.
    wo : float32 [query head, hidden, value_dim]
        What a query head's output is multiplied by; the hidden sum over heads follows.
    score : float32 [token, KV head]
        Recorded score, higher = kept; NaN where a token has none.
    """

    q_prerope: Floats | None = None
    inv_freq: Doubles | None = None
    wo: Floats | None = None
    score: Floats | None = None


def _first_models(trace: Trace) -> set[int]:
    found: dict[int, int] = {}
    for spec in trace.layers:
        found.setdefault(spec.model // NUMBERS_PER_RANK, spec.model)
    return set(found.values())


def missing(trace: Trace, layers: Sequence[Layer]) -> dict[str, str]:
    """Return why a signal of `EXTRA` cannot be had, for those that cannot."""
    found = {}
    if "wo" not in trace.signals:
        found["wo"] = "the trace lacks the output projections wo"
    elif {spec.model for spec in layers} - _first_models(trace):
        found["wo"] = "the trace has the output projections wo of each rank's first model alone"
    if "score" not in trace.signals:
        found["score"] = "the trace lacks recorded scores (array score)"
    if "q_prerope" not in trace.signals:
        problem = next(
            (p for p in (turning(trace, spec) for spec in layers) if isinstance(p, str)), None
        )
        if problem:
            found["q_prerope"] = f"the trace lacks the queries before RoPE, and {problem}"
    return found


def extra_signals(
    trace: Trace, spec: Layer, request: int, q: Floats | None, wanted: frozenset[str]
) -> Extra:
    """Read or derive what is `wanted` of one layer; `missing` has been asked before."""
    fields: dict[str, Any] = {}
    if "q_prerope" in wanted and q is not None:
        fields |= _prerope(trace, spec, request, q)
    if "wo" in wanted:
        fields["wo"] = _output_projections(trace, spec, request)
    if "score" in wanted:
        fields["score"] = trace.row_array("score", spec.layer, request)
    return Extra(**fields)


def rotate(vectors: NDArray[Any], positions: NDArray[Any], inv_freq: Doubles) -> Doubles:
    """Turn `vectors` [token, ..., head_dim] by RoPE at `positions` [token]; negative turns back.

    Dimensions i and i + head_dim / 2 are a pair, as in Llama.
    """
    angles = np.multiply.outer(positions.astype(np.float64), inv_freq)
    angles = angles.reshape(len(angles), *[1] * (vectors.ndim - 2), -1)
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = np.split(vectors.astype(np.float64), 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def fitted_frequencies(q: Floats, q_prerope: Floats) -> Doubles:
    """Radians per position that turn `q_prerope` [token, head, head_dim] into `q`.

    The turn over ever longer distances, each told apart by the one before, so that rounding of
    the inputs matters less and less.
    """
    after, before = (_complex(x).swapaxes(0, 1) for x in (q, q_prerope))
    turned = (after * before.conj()).sum(axis=0)  # [token, pair]: |.| e^(i position inv_freq)
    found = np.zeros(turned.shape[1])
    lag = 1
    while lag < len(turned):
        turn = np.angle((turned[lag:] * turned[:-lag].conj()).sum(axis=0))
        found += np.angle(np.exp(1j * (turn - found * lag))) / lag
        lag *= 2
    return found


def _complex(x: Floats) -> NDArray[np.complex128]:
    first, second = np.split(x.astype(np.float64), 2, axis=-1)
    return np.asarray(first + 1j * second)


def _prerope(trace: Trace, spec: Layer, request: int, q: Floats) -> dict[str, Any]:
    if "q_prerope" in trace.signals:
        before = trace.row_array("q_prerope", spec.layer, request)[: len(q)]
        return {"q_prerope": before, "inv_freq": fitted_frequencies(q, before)}
    rope = turning(trace, spec)
    if isinstance(rope, str):
        raise ValueError(f"q cannot be turned back: {rope}; `missing` says so")
    before = rope.turn(q, -np.arange(len(q))).astype(np.float32)
    return {"q_prerope": before, "inv_freq": rope.inv_freq}


def turning(trace: Trace, spec: Layer) -> Rope | str:
    """How q is turned by its position, all of it and half by half; or why that is not so."""
    found = ropes(trace, [spec])
    if isinstance(found, str):
        return found
    rope = found[spec.layer]
    if rope.is_interleaved:
        return "it rotates other pairs of dimensions"
    if rope.width != spec.head_dim:
        return "only a part of the dimensions is rotated"
    return rope


def _output_projections(trace: Trace, spec: Layer, request: int) -> Floats:
    # [hidden, q_head * value_dim]
    whole = np.asarray(trace.static("wo", request)[spec.layer], np.float32)
    by_head = whole.reshape(len(whole), -1, spec.value_dim).transpose(1, 0, 2)
    return np.ascontiguousarray(by_head[spec.q_head_numbers])
