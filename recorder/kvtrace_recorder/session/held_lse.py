"""Log-sum-exps of held decode steps, on the device that has their keys.

Of a large model the writer would need longer for one token's than the model for the token. Where
the cache still has all keys in one tensor, the rows of up to 32 steps take one pass over it.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from kvtrace.writer import LayerSpec
from kvtrace_recorder.session.requests import Bools
from kvtrace_recorder.taps.received import row_sums


def held_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    real: Bools,
    spec: LayerSpec,
    dtype: torch.dtype,
    sinks: torch.Tensor | None,
) -> torch.Tensor | None:
    """Log-sum-exps of the last tokens of some sequences.

    Parameters
    ----------
    q : torch.Tensor
        [batch, q_head, token, head_dim], those tokens' queries.
    k : torch.Tensor
        [batch, kv_head, slot, head_dim]: of every slot, those tokens' last; room may follow.
    real : numpy.ndarray
        [batch, slot] of bool: whether a slot holds a token rather than padding.
    spec, dtype, sinks
        As `row_sums` takes them.

    Returns
    -------
    torch.Tensor or None
        [batch, token, q_head] float32, NaN for padding; None where padding stands in between.
    """
    (batch, heads, length, width), slots = q.shape, real.shape[1]
    if real.all():
        # All sequences at once, as if their heads were those of one.
        one = row_sums(
            q.reshape(batch * heads, length, width),
            k[:, :, :slots].reshape(-1, slots, width),
            slots - length,
            0,
            _repeated(spec, batch),
            dtype=dtype,
            sinks=None if sinks is None else sinks.repeat(batch),
            received=False,
        )
        return one.lse.view(length, batch, heads).transpose(0, 1)
    found = torch.full((batch, length, heads), torch.nan, dtype=torch.float32, device=q.device)
    for row, held in enumerate(real):
        first, count = int(held.argmax()), int(held[slots - length :].sum())
        end = slots - length + count
        if not held[first:end].all():
            return None
        if count:
            found[row, :count] = row_sums(
                q[row, :, :count],
                k[row, :, first:end],
                slots - length - first,
                0,
                spec,
                dtype=dtype,
                sinks=sinks,
                received=False,
            ).lse
    return found


def _repeated(spec: LayerSpec, batch: int) -> LayerSpec:
    slopes, bias = spec.alibi_slopes, spec.position_bias
    return replace(
        spec,
        alibi_slopes=None if slopes is None else tuple(slopes) * batch,
        position_bias=None if bias is None else tuple(bias) * batch,
    )
