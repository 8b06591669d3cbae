"""Attention rows, 64 at a time: what policies and measures look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.kernels import sum_group
from kvtrace_viewer.replay.products import aligned, packed
from kvtrace_viewer.replay.softmax import (
    FEW,
    SPAN,
    attention_of_rows,
    exp_of_rows,
    find_needed,
    least_float,
)

BLOCK_ROWS = 64  # 64 rows of every head of a layer stay in the caches of a CPU, a map does not

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Head:
    """One KV head of one layer, with its group of query heads, over a whole request.

    Attributes
    ----------
    q : float32 [token, query head of the group, head_dim]
        Queries as the model used them (after RoPE); zero where the trace does not hold them.
    k, v : float32 [token, head_dim]
        Keys and values; v is None where the trace has none.
    lse : float32 [token, query head of the group] or None
        Log-sum-exp of each row's scores; derived from q and k where None.
    scale : float
        Factor on q k^T.
    prompt_tokens : int
        Tokens of the prompt, at most `tokens`.
    window : int or None
        Keys a query can see, itself included; None where it sees all.
    softcap : float or None
        Scores are softcap * tanh(score / softcap).
    alibi_slopes : float32 [query head of the group] or None
        Added to a score times (key position - query position).
    has_sinks : bool
        Whether a learned sink takes its part of every row's attention.
    received : float32 [token, query head of the group] or None
        Attention that the prompt's tokens received from all of its queries, zero for the others;
        only where the trace does not hold all of those queries.
    layer, kv_head, num_layers : int
        Where the head stands in the model.
    q_prerope : float32 [token, query head of the group, head_dim] or None
        Queries before RoPE; like all that follow only where a policy declares the signal.
    inv_freq : float64 [head_dim / 2] or None
        What RoPE turns dimensions i and i + head_dim / 2 by per position, in radians; comes with
        q_prerope. See `signals.rotate`.
    wo : float32 [query head of the group, hidden, value_dim] or None
        Output projection of each query head.
    score : float32 [token] or None
        Recorded score, higher = kept; NaN where a token has none.
    surveys : mapping of str to mapping of int to object
        By policy spec and layer, what its `survey` found.
    """

    q: Floats
    k: Floats
    v: Floats | None
    lse: Floats | None
    scale: float
    prompt_tokens: int
    window: int | None = None
    softcap: float | None = None
    alibi_slopes: Floats | None = None
    has_sinks: bool = False
    received: Floats | None = None
    layer: int = 0
    kv_head: int = 0
    num_layers: int = 1
    q_prerope: Floats | None = None
    inv_freq: NDArray[np.float64] | None = None
    wo: Floats | None = None
    score: Floats | None = None
    surveys: Mapping[str, Mapping[int, Any]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens of the request."""
        return len(self.k)

    @property
    def group(self) -> int:
        """Query heads that read this KV head."""
        return int(self.q.shape[1])

    @cached_property
    def has_query(self) -> NDArray[np.bool_]:
        """[token]: False for rows whose query the trace does not hold; they are not measured."""
        if self.lse is None:
            return np.ones(self.tokens, dtype=np.bool_)
        return np.asarray(np.isfinite(self.lse).all(axis=1))

    @cached_property
    def packed_keys(self) -> Floats:
        """[panel, head_dim, LANES]: the keys as products of rows read them."""
        return packed(self.k)

    @cached_property
    def values_and_one(self) -> Floats:
        """[token, value_dim + 1]: v, and a column of ones beside it."""
        values = np.empty((self.tokens, 0), np.float32) if self.v is None else self.v
        return np.column_stack([values, np.ones(self.tokens, np.float32)])

    @cached_property
    def received_in_prompt(self) -> NDArray[np.float64]:
        """[token]: `received` summed over the group; zeros where rows say it."""
        if self.received is None:
            return np.zeros(self.tokens)
        return np.asarray(self.received.sum(axis=1, dtype=np.float64))

    def rows(self, start: int, stop: int, buffer: Floats) -> Floats:
        """Attention of queries start..stop-1: float32 [query head, row, key 0..stop-1].

        Zero where a query cannot see a key. The result lies in `buffer` (at least
        group * (stop - start) * stop values), valid until the buffer is used again.
        """
        size = self.group * (stop - start) * stop
        scores = buffer[:size].reshape(self.group * (stop - start), stop)
        if not self.has_query[start:stop].any():
            scores[:] = 0
            return scores.reshape(self.group, stop - start, stop)
        rows = scores.reshape(self.group, stop - start, stop)
        if self.lse is not None and self.softcap is None and self.alibi_slopes is None:
            self._fused_rows(self.lse, start, stop, rows)
            return rows
        scale = self.scale if self.softcap is None else self.scale / self.softcap
        queries = self.q[start:stop].transpose(1, 0, 2) * np.float32(scale)
        for g, out in enumerate(rows):  # a query head's rows stay in the cache of the core
            np.matmul(queries[g], self.k[:stop].T, out=out)
            self._finish(out, g, start, stop)
        return rows

    def _fused_rows(self, lse: Floats, start: int, stop: int, rows: Floats) -> None:
        """As `rows`, where scores are nothing but products: not even these are written."""
        by_head = self.q[start:stop].transpose(1, 0, 2)
        queries = np.multiply(by_head, np.float32(self.scale), order="C")
        window, memory = self.window or self.tokens, aligned(FEW, SPAN)
        for g, out in enumerate(rows):
            totals = self._totals(lse, g, start, stop)
            attention_of_rows(queries[g], self.packed_keys, totals, start, window, memory, out)

    def _totals(self, lse: Floats, g: int, start: int, stop: int) -> Floats:
        """[row]: log-sum-exp of query head g, infinite where there is no query."""
        return np.where(self.has_query[start:stop], lse[start:stop, g], np.float32(np.inf))

    def _finish(self, rows: Floats, g: int, start: int, stop: int) -> None:
        """Turn products [row, key] of query head g into attention."""
        if self.softcap is not None:
            np.tanh(rows, out=rows)
            rows *= np.float32(self.softcap)
        if self.alibi_slopes is not None:
            distance = np.arange(stop)[None, :] - np.arange(start, stop)[:, None]
            rows += self.alibi_slopes[g] * distance.astype(np.float32)
        queries = np.arange(start, stop)
        if self.window is not None and stop > self.window:
            rows[np.arange(stop) <= queries[:, None] - self.window] = -np.inf
        if self.lse is None:
            rows[:, start:][queries > queries[:, None]] = -np.inf
            exp_of_rows(rows, rows.max(axis=1), start)
            rows /= rows.sum(axis=1, keepdims=True)
        else:
            exp_of_rows(rows, self._totals(self.lse, g, start, stop), start)

    def attention(self, start: int, stop: int) -> Floats:
        """Return `rows` in memory of their own."""
        return self.rows(start, stop, np.empty(self.group * (stop - start) * stop, np.float32))


@dataclass(frozen=True, eq=False)
class Needed:
    """Keys that queries need, row by row: a[i,j] >= 1/(i+1).

    Attributes
    ----------
    starts : int64 [row * query head + 1]
        Where the keys of (row, query head) begin in `keys`; query heads vary fastest.
    keys : int32
        Needed key positions, ascending within a (row, query head); from starts[-1] on they mean
        nothing.
    """

    starts: NDArray[np.int64]
    keys: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Block:
    """The attention of one KV head's queries start..stop-1 on keys 0..stop-1.

    Attributes
    ----------
    head : Head
        The head, with its keys, values and queries.
    start, stop : int
        First row, and one past the last.
    attention : float32 [query head of the group, row, key]
        Post-softmax attention of the full cache; the engine's buffer, do not write, do not keep.
    needed_share : float
        Threshold of being needed, in uniform shares.
    layer : tuple of Block
        The same rows of all KV heads of the layer; only for policies with `across_heads`.
    """

    head: Head
    start: int
    stop: int
    attention: Floats
    needed_share: float = 1.0
    layer: tuple[Block, ...] = ()

    @cached_property
    def received(self) -> NDArray[np.float64]:
        """[row, key]: attention summed over the group's query heads."""
        found = np.empty(self.attention.shape[1:])
        sum_group(self.attention, found)
        return found

    @property
    def is_summed(self) -> bool:
        """Whether `Head.received` holds what these rows gave: the prompt's, on a thinned trace."""
        return self.head.received is not None and self.stop <= self.head.prompt_tokens

    @property
    def newly_received(self) -> NDArray[np.float64]:
        """[row, key]: as `received`; zeros where `Head.received` already counts the rows."""
        return np.zeros_like(self.received) if self.is_summed else self.received

    @cached_property
    def row_sums(self) -> NDArray[np.float64]:
        """[query head, row]: what a row's attention on keys sums to."""
        return np.asarray(self.attention.sum(axis=2, dtype=np.float64))

    @cached_property
    def sink_share(self) -> NDArray[np.float64]:
        """[query head, row]: what a learned sink takes of each row; zeros where there is none."""
        if not self.head.has_sinks:
            return np.zeros(self.attention.shape[:2])
        return np.where(self.row_sums > 0, np.maximum(1 - self.row_sums, 0), 0)

    @cached_property
    def needed(self) -> Needed:
        """The keys each query needs."""
        group, rows, stop = self.attention.shape
        starts = np.empty(rows * group + 1, dtype=np.int64)
        keys = np.empty(group * rows * stop + 1, dtype=np.int32)
        limits = least_float(self.needed_share / (np.arange(self.start, self.stop) + 1))
        find_needed(self.attention, self.start, limits, starts, keys)
        return Needed(starts, keys)
