"""Re-rotation: attention to kept keys whose positions are renumbered to where they stand.

StreamingLLM numbers positions within the cache, and re-rotates keys to them (so do SinkCache and
kvpress' KeyRerotationPress). A query's position is then the number of keys that its cache holds,
so that a key comes nearer by every token that was evicted between the two: its score is
`q . R(t) k`, with t of those tokens and R the model's own rotation. Which tokens are evicted is
decided as without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtrace.errors import InputError
from kvtrace.rope import TOLERANCE, Rope, rope_error, ropes
from kvtrace.trace import Trace
from kvtrace_viewer.replay.block import Head
from kvtrace_viewer.replay.engine import HeadReplay
from kvtrace_viewer.replay.jit import jit_sum
from kvtrace_viewer.replay.policy import Policy

Doubles = NDArray[np.float64]
Longs = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Rerotated:
    """What one KV head's pairs attend to with renumbered positions.

    Attributes
    ----------
    overlap, error : float64 [pair], summed over rows and query heads; error NaN without v
    rows : int64 [pair], rows that were measured
    group : int
    """

    overlap: Doubles
    error: Doubles
    rows: Longs
    group: int

    def __add__(self, other: Rerotated) -> Rerotated:
        """The same head over two requests."""
        sums = (self.overlap + other.overlap, self.error + other.error, self.rows + other.rows)
        return Rerotated(*sums, self.group)

    def means(self, pair: int) -> tuple[float | None, float | None]:
        """Overlap and output error over rows and query heads; None where there is none."""
        return mean_overlap_and_error([self], pair)


def mean_overlap_and_error(
    parts: Iterable[Rerotated], pair: int
) -> tuple[float | None, float | None]:
    """The means of a pair over several heads."""
    rows, overlap, error = 0, 0.0, 0.0
    for one in parts:
        rows += int(one.rows[pair]) * one.group
        overlap, error = overlap + one.overlap[pair], error + one.error[pair]
    if not rows:
        return None, None
    return float(overlap / rows), float(error / rows) if np.isfinite(error) else None


RENUMBERED = (
    "re-rotated: output error and overlap are with positions renumbered in the cache; what is kept,"
    " retained mass, hits and misses are of the attention at the recorded positions"
)


def known_ropes(
    trace: Trace, requests: Sequence[int], policies: Iterable[Policy] = ()
) -> dict[int, Rope]:
    """How the layers of some requests turn their keys, by layer.

    Raises
    ------
    InputError
        For a policy that evicts nothing, and where the model has no rotary positions, or how it
        turns is not known, or the recorded keys of layer 0 say something else.
    """
    for policy in policies:
        if policy.selects:
            raise InputError(
                f"{policy.name} chooses per query what is read; re-rotation renumbers what is left"
                " after evictions; leave --rerotate out, or choose a policy that evicts"
            )
    layers = [spec for spec in trace.layers_of(requests[0]) if not spec.is_cross]
    found = ropes(trace, layers)
    expected = "keys turned by RoPE were expected; leave --rerotate out"
    if isinstance(found, str):
        raise InputError(f"{trace.path} cannot be re-rotated: {found}; {expected}")
    for request in requests:
        ids = trace.tokens(request)["token_id"]
        data = trace.layer_data(layers[0].layer, request) if layers[0].layer == 0 else None
        if data is None or data.k is None or ids.null_count:
            continue
        known = np.isfinite(data.k).all(axis=(1, 2))
        error = rope_error(found[0], data.k[known], ids.to_numpy()[known])
        if error is not None and error > TOLERANCE:
            raise InputError(
                f"{trace.path} cannot be re-rotated: turned back by what its configuration says, "
                f"layer 0's keys of equal tokens are {error:.0%} apart; within {TOLERANCE:.0%} was "
                "expected; leave --rerotate out"
            )
    return found


def measure_rerotated(replayed: HeadReplay, rope: Rope) -> Rerotated:
    """Measure the rows whose output error is taken, with positions renumbered."""
    head, measures = replayed.head, replayed.measures
    pairs = len(replayed.evicted_at)
    overlap, error, rows = np.zeros(pairs), np.zeros(pairs), np.zeros(pairs, np.int64)
    at = np.arange(head.tokens)
    offsets = at - measures.first_rows[:, None]
    sampled = (offsets >= 0) & (offsets % measures.strides[:, None] == 0) & head.has_query
    turned = _Turned(head, rope)
    for row in np.flatnonzero(sampled.any(axis=0)):
        full = turned.row(int(row))
        for p in np.flatnonzero(sampled[:, row]):
            found = full.under(replayed.evicted_at[p, : row + 1])
            overlap[p] += found[0]
            error[p] += found[1]
            rows[p] += 1
    return Rerotated(overlap, error, rows, head.group)


class _Turned:
    """A head's queries and keys, pair by pair, and the turns of every distance."""

    def __init__(self, head: Head, rope: Rope) -> None:
        self.head = head
        self.queries = _parts(rope, head.q)
        self.keys = _parts(rope, head.k)
        angles = np.multiply.outer(np.arange(head.tokens), rope.inv_freq)
        self.cos, self.sin = np.cos(angles), np.sin(angles)

    def row(self, row: int) -> _Row:
        """One query's full attention."""
        return _Row(self, row)


def _parts(rope: Rope, vectors: NDArray[np.float32]) -> tuple[Doubles, Doubles, Doubles]:
    first, second, rest = (np.ascontiguousarray(x, np.float64) for x in rope.split(vectors))
    return first, second, rest


class _Row:
    """One row with the full cache, and under renumbered kept sets."""

    def __init__(self, of: _Turned, row: int) -> None:
        self.of, self.at = of, row
        head = of.head
        self.full = head.attention(row, row + 1)[:, 0].astype(np.float64)
        share = np.maximum(1 - self.full.sum(axis=1), 0) * head.has_sinks
        self.sink = self._sink_score(share)
        self.output = None if head.v is None else self._output(self.full, share)

    def _sink_score(self, share: Doubles) -> Doubles:
        """[query head]: score of the learned sink that took this share; -inf without."""
        head = self.of.head
        if head.lse is None or not head.has_sinks:
            return np.full(head.group, -np.inf)
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(share) + head.lse[self.at])

    def under(self, evicted_at: NDArray[np.int32]) -> tuple[float, float]:
        """Overlap with the full cache's attention, and output error, summed over query heads."""
        attention, sink = self.attention(evicted_at)
        overlap = float(np.minimum(attention, self.full).sum())
        if self.output is None:
            return overlap, np.nan
        apart = np.linalg.norm(self._output(attention, sink) - self.output, axis=1)
        size = np.linalg.norm(self.output, axis=1)
        return overlap, float((apart[size > 0] / size[size > 0]).sum())

    def attention(self, evicted_at: NDArray[np.int32]) -> tuple[Doubles, Doubles]:
        """Attention [query head, key] with renumbered positions, and the learned sink's share."""
        head, (q1, q2, q_rest) = self.of.head, self.of.queries
        gone = evicted_at < self.at
        # Tokens that were evicted behind each key: so much nearer it has come.
        nearer = gone[::-1].cumsum()[::-1]
        held = np.flatnonzero(~gone)
        scores = np.empty((head.group, len(held)))
        turned_scores(
            q1[self.at],
            q2[self.at],
            q_rest[self.at],
            *self.of.keys,
            held,
            nearer,
            self.of.cos,
            self.of.sin,
            scores,
        )
        scores *= head.scale
        if head.softcap is not None:
            scores = head.softcap * np.tanh(scores / head.softcap)
        highest = np.maximum(scores.max(axis=1), self.sink)
        weights, sink = np.exp(scores - highest[:, None]), np.exp(self.sink - highest)
        total = weights.sum(axis=1) + sink
        found = np.zeros_like(self.full)
        found[:, held] = weights / total[:, None]
        return found, sink / total

    def _output(self, attention: Doubles, sink: Doubles) -> Doubles:
        """[query head, value_dim], renormalised; a learned sink has a share and no value."""
        v = self.of.head.v
        if v is None:
            raise ValueError("output error needs values")
        total = attention.sum(axis=1) + sink
        return np.asarray(attention @ v[: attention.shape[1]] / total[:, None])


@jit_sum
def turned_scores(
    q_first: Doubles,
    q_second: Doubles,
    q_rest: Doubles,
    k_first: Doubles,
    k_second: Doubles,
    k_rest: Doubles,
    held: Longs,
    nearer: Longs,
    cos: Doubles,
    sin: Doubles,
    scores: Doubles,
) -> None:
    """Products q . R(t) k of one row with the keys it holds.

    Parameters
    ----------
    q_first, q_second [query head, pair], q_rest [query head, dimension] : the query
    k_first, k_second, k_rest : the same by key
    held : int64 [held], positions
    nearer : int64 [key], t
    cos, sin : float64 [t, pair]
    scores : float64 [query head, held], written
    """
    for h in range(held.shape[0]):
        j = held[h]
        c, s = cos[nearer[j]], sin[nearer[j]]
        a, b, rest = k_first[j], k_second[j], k_rest[j]
        for g in range(q_first.shape[0]):
            x, y, total = q_first[g], q_second[g], 0.0
            for p in range(c.shape[0]):
                total += c[p] * (x[p] * a[p] + y[p] * b[p]) + s[p] * (y[p] * a[p] - x[p] * b[p])
            for d in range(rest.shape[0]):
                total += q_rest[g, d] * rest[d]
            scores[g, h] = total
