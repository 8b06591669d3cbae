"""Log-sum-exps of rows and the attention that keys received, where the tensors are.

For what cannot be derived from the trace later: `received` where not every query is kept, and the
log-sum-exps on a device whose keys would take the writer too long.

Cost: one more q k^T in float32 and an exponential for every visible pair; on a GPU about 6% of a
prefill's FLOPs at 8k tokens of an 8B model and a third at 128k, on a CPU about what the attention
of the same layer costs. Memory: the scores of one block of queries (`BLOCK_SCORES` numbers, or 16
queries' where that is more) and a float32 copy of the layer's keys; never token x token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvtrace.writer import LayerSpec

#: Scores computed at a time: what fits the caches of a CPU, and what fills a GPU.
BLOCK_SCORES = {"cpu": 1 << 20, "cuda": 1 << 24}
LEAST_QUERIES = 16
#: e to less than this is lost in any sum, and denormal numbers take a CPU many times as long.
LEAST_EXPONENT = -80.0


@dataclass(frozen=True)
class RowSums:
    """What some queries of one request did in one layer.

    Attributes
    ----------
    lse : torch.Tensor
        [query, q_head] float32, as `kvtrace_recorder.lse.row_lse` gives it.
    received : torch.Tensor or None
        [key, q_head] float32: attention after the softmax, summed over the queries.
    """

    lse: torch.Tensor
    received: torch.Tensor | None


@torch.no_grad()
def row_sums(
    q: torch.Tensor,
    k: torch.Tensor,
    query_first: int,
    key_first: int,
    spec: LayerSpec,
    *,
    dtype: torch.dtype,
    sinks: torch.Tensor | None = None,
    received: bool = True,
) -> RowSums:
    """Sums over the attention rows of some queries of one request.

    Parameters
    ----------
    q : torch.Tensor
        [q_head, query, head_dim], any float type.
    k : torch.Tensor
        [kv_head, key, head_dim]: at least every key that a query sees.
    query_first, key_first : int
        Positions in the request of the first of them; the others follow without a hole.
    spec : LayerSpec
        Gives scale, softcap, window, biases and whether the layer is causal.
    dtype : torch.dtype
        The trace's: sums are over q and k as they are stored, so that a reader finds the same.
    sinks : torch.Tensor, optional
        [q_head], a further logit in each head's softmax.
    received : bool
        Also what the keys received.
    """
    q_heads, queries, width = q.shape
    kv_heads, keys, _ = k.shape
    by_head = as_stored(q, dtype).reshape(kv_heads, q_heads // kv_heads, queries, width)
    stored = as_stored(k, dtype).float().transpose(1, 2)
    lse = torch.empty(queries, q_heads, dtype=torch.float32, device=q.device)
    sums = torch.zeros(q_heads, keys, dtype=torch.float32, device=q.device) if received else None
    budget = BLOCK_SCORES["cpu" if q.device.type == "cpu" else "cuda"]
    height = max(LEAST_QUERIES, budget // max(1, q_heads * keys))
    for start in range(0, queries, height):
        stop = min(start + height, queries)
        low, high = _seen(query_first + start, query_first + stop, key_first, keys, spec)
        if low >= high:
            lse[start:stop] = -torch.inf if sinks is None else sinks.float()
            continue
        scores = _scores(
            by_head[:, :, start:stop].float(),
            stored[:, :, low:high],
            query_first + start,
            key_first + low,
            spec,
        )
        # One exponential serves both sums.
        top = scores.amax(dim=2, keepdim=True)
        if sinks is not None:
            top = torch.maximum(top, sinks.float()[:, None, None])
        weights = scores.sub_(top).clamp_(min=LEAST_EXPONENT).exp_()
        total = weights.sum(dim=2, keepdim=True)
        if sinks is not None:
            total += torch.exp(sinks.float()[:, None, None] - top)
        lse[start:stop] = (top + total.log())[:, :, 0].T
        if sums is not None:
            sums[:, low:high] += torch.bmm(total.reciprocal().transpose(1, 2), weights)[:, 0]
    return RowSums(lse, None if sums is None else sums.T.contiguous())


def as_stored(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values as the trace will hold them, in its type."""
    if values.dtype == dtype:
        return values
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype)


def _seen(first: int, end: int, key_first: int, keys: int, spec: LayerSpec) -> tuple[int, int]:
    """The stretch of keys that any query at positions first to end - 1 can see."""
    if spec.attention_kind == "bidirectional":
        return 0, keys
    low = 0 if spec.sliding_window is None else first - spec.sliding_window + 1 - key_first
    return max(0, low), min(keys, end - key_first)


def _scores(
    q: torch.Tensor,
    keys: torch.Tensor,
    query_first: int,
    key_first: int,
    spec: LayerSpec,
) -> torch.Tensor:
    """[q_head, query, key] of q [kv_head, group, query, width] on keys [kv_head, width, key]."""
    kv_heads, group, queries, width = q.shape
    found = torch.bmm((q * spec.scale).reshape(kv_heads, group * queries, width), keys)
    found = found.view(kv_heads * group, queries, -1)
    if spec.softcap is not None:
        found = found.div_(spec.softcap).tanh_().mul_(spec.softcap)
    if spec.alibi_slopes is None and spec.position_bias is None:
        return _hide(found, query_first, key_first, spec)
    rows = torch.arange(query_first, query_first + queries, device=q.device)
    columns = torch.arange(key_first, key_first + keys.shape[2], device=q.device)
    distance = rows[:, None] - columns[None, :]
    if spec.alibi_slopes is not None:
        slopes = torch.tensor(spec.alibi_slopes, dtype=torch.float32, device=q.device)
        found = found - slopes[:, None, None] * distance
    if spec.position_bias is not None:
        table = torch.tensor(spec.position_bias, dtype=torch.float32, device=q.device)
        reach = table.shape[1] // 2
        found = found + table[:, (-distance).clamp(-reach, reach) + reach]
    return _hide(found, query_first, key_first, spec)


def _hide(scores: torch.Tensor, query_first: int, key_first: int, spec: LayerSpec) -> torch.Tensor:
    """Hide from scores [q_head, query, key] what the queries do not see."""
    if spec.attention_kind == "bidirectional":
        return scores
    queries, keys = scores.shape[1:]
    # Without a window only keys behind the first query are hidden from any.
    edge = 0 if spec.sliding_window is not None else max(0, query_first + 1 - key_first)
    rows = torch.arange(query_first, query_first + queries, device=scores.device)
    columns = torch.arange(key_first + edge, key_first + keys, device=scores.device)
    distance = rows[:, None] - columns[None, :]
    hidden = distance < 0
    if spec.sliding_window is not None:
        hidden |= distance >= spec.sliding_window
    scores[:, :, edge:].masked_fill_(hidden, -torch.inf)
    return scores
