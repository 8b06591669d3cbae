"""Which form of attention a call is, where nothing but its operands says so."""

from __future__ import annotations

import numpy as np
import torch

from kvtrace.writer import LayerSpec
from kvtrace_recorder.session.step import ActiveStep
from kvtrace_recorder.taps.bias import Measured, hidden_below, measure
from kvtrace_recorder.taps.call import Call
from kvtrace_recorder.taps.guard import UnrecordableError
from kvtrace_recorder.taps.keep import q_heads
from kvtrace_recorder.taps.masks import is_check_due


def settle(step: ActiveStep, call: Call) -> None:
    """Say in `call.extra` whether a call is causal, slides or has ALiBi; its mask becomes bool.

    Raises
    ------
    UnrecordableError
        For a mask that adds anything but ALiBi, and where a layer differs from what it was.
    """
    known = step.model.specs.get(step.model.layer_of(call.module, call.nth))
    if known is not None and not is_check_due(step):
        call.mask = None
        return
    if call.mask is not None:
        call.mask, measured = _split(step, call.mask, call.q.shape[2])
        if measured is not None:
            use(call, measured, known)
    call.extra["is_causal"] = _is_causal(step, call)
    call.extra.setdefault("sliding_window", _window(step, call))
    if known is None or call.extra["is_causal"] is None:
        return
    if call.extra["is_causal"] == (known.attention_kind == "bidirectional"):
        raise UnrecordableError(f"layer {known.layer} was causal in some steps and not in others")


def use(call: Call, measured: Measured, known: LayerSpec | None) -> None:
    """Take over the slopes measured in a call of a layer, or compare them.

    Raises
    ------
    UnrecordableError
        Where they cannot be told, or differ from what they were.
    """
    slopes = measured.slopes
    if known is None:
        if slopes is None:
            raise UnrecordableError("too few keys to tell which bias an attention adds")
        call.extra["alibi_slopes"] = slopes.tolist() if slopes.any() else None
    elif not _agrees(measured, known):
        raise UnrecordableError(f"layer {known.layer} adds another bias than it did before")


def _agrees(measured: Measured, known: LayerSpec) -> bool:
    slopes = measured.slopes
    if slopes is None:
        return known.alibi_slopes is not None
    if known.kv_heads is not None and len(slopes) != known.num_q_heads:
        slopes = slopes[q_heads(known.kv_heads, known.num_q_heads // known.num_kv_heads)]
    expected, slack = known.alibi_slopes or 0.0, max(measured.slack, 1e-6)
    return measured.keys < 2 or np.allclose(slopes, expected, rtol=1e-3, atol=slack)


def fullest(step: ActiveStep) -> tuple[int, int]:
    """The batch row with most tokens in the step, and its last query."""
    row = int(step.real.sum(axis=1).argmax())
    tokens = np.flatnonzero(step.real[row])
    return row, int(tokens[-1]) if len(tokens) else step.length - 1


def _split(
    step: ActiveStep, mask: torch.Tensor, queries: int
) -> tuple[torch.Tensor, Measured | None]:
    """Which keys a mask shows [batch or 1, 1, query, key], and the ALiBi in it."""
    key = id(mask)
    if key not in step.masks:
        seen, measured = mask[:, :1].detach(), None
        if mask.dtype != torch.bool:
            seen, measured = seen > hidden_below(mask.dtype), _mask_bias(step, mask)
        # The mask itself is held too, so that no other gets its id while the step runs.
        step.masks[key] = (mask, seen.expand(-1, -1, queries, -1), measured)
    return step.masks[key][1], step.masks[key][2]


def _mask_bias(step: ActiveStep, mask: torch.Tensor) -> Measured:
    row, query = fullest(step)
    row, query = min(row, mask.shape[0] - 1), min(query, mask.shape[2] - 1)
    values = mask[row, :, query].detach().double().cpu().numpy()
    seen = (values > hidden_below(mask.dtype)).all(axis=0)
    positions = np.flatnonzero(seen).astype(np.float64)
    return measure(values[:, seen], np.zeros_like(values[:, seen]), positions, [0.0], mask.dtype)


def _is_causal(step: ActiveStep, call: Call) -> bool | None:
    row, last = fullest(step)
    first = int(np.flatnonzero(step.real[row])[0])
    if first == last:
        return None
    if call.mask is None:
        return bool(call.extra.get("is_causal"))
    shown = call.mask[min(row, call.mask.shape[0] - 1), 0]
    # A cache of fixed size has room behind the step's own keys.
    held = min(call.k.shape[2], step.past + step.length)
    return not bool(shown[first, held - step.length + last])


def _window(step: ActiveStep, call: Call) -> int | None:
    """The window of a call; a mask shows it where a sequence is whole in every step."""
    if not step.model.is_plain:
        # GPT-Neo's own words for it.
        local = getattr(call.module, "attention_type", None) == "local"
        return int(call.module.config.window_size) if local else None
    if call.mask is None or not call.extra["is_causal"]:
        return None
    row, query = fullest(step)
    shown = call.mask[min(row, call.mask.shape[0] - 1), 0, query]
    count = int(shown.sum())
    return count if count < int(step.real[row].sum()) else None
