"""From the operands of an attention call to the rows of a trace."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import BaseQuantizedLayer, StaticLayer, StaticSlidingWindowLayer

from kvtrace.writer import LayerSpec
from kvtrace_recorder.session.continuous import is_paged
from kvtrace_recorder.session.keeping import Keeper
from kvtrace_recorder.session.models import ModelState
from kvtrace_recorder.session.step import ActiveStep, Hold, Taken
from kvtrace_recorder.taps.call import Call
from kvtrace_recorder.taps.cross import take_cross
from kvtrace_recorder.taps.guard import UnrecordableError
from kvtrace_recorder.taps.keep import (
    choose_heads,
    kinds_of,
    of_heads,
    sum_rows,
    summed_prompts,
)
from kvtrace_recorder.taps.masks import check_mask
from kvtrace_recorder.taps.packed_masks import check_packed_mask
from kvtrace_recorder.taps.position_bias import bias_table, check_bias
from kvtrace_recorder.taps.shards import place_heads

#: Asking an abstract class costs more than the rest of the look-up: once a type.
_FORMS: dict[type, str] = {}
#: What a quantised cache means for the rows.
QUANTISED = (
    "rows hold keys and values as they were computed; these rows read earlier ones back from a"
    " {}, rounded, so attention recomputed from the trace is near the model's, not equal to it"
)


def take_rows(step: ActiveStep, call: Call, keeper: Keeper) -> Taken | None:
    """Take what is kept of one layer's rows of the running step; nothing is copied.

    Returns
    -------
    Taken or None
        None for a layer that was not asked for.

    Raises
    ------
    UnrecordableError
        Where the rows or what they attended to cannot be known.
    """
    layer = step.model.layer_of(call.module, call.nth)
    if not keeper.asks(layer):
        return None
    if layer in step.taken:
        raise UnrecordableError(f"layer {layer} attended twice in one step")
    q, length = call.q, step.length
    if q.ndim != 4 or q.shape[0] != step.batch or q.shape[2] != length:
        raise UnrecordableError(
            f"layer {layer} had queries of shape {tuple(q.shape)} in a step of"
            f" {step.batch} x {length} tokens"
        )
    spec = _spec(step.model, layer, call, keeper)
    check_bias(step, call, spec)
    index = step.model.cache_index(call.module, layer)
    if spec.attention_kind == "cross":
        step.taken[layer] = found = take_cross(step, call, spec, keeper)
        return found
    first, offset = _new_keys(step, spec, index, call.k)
    if spec.sliding_window is not None and not step.is_contiguous:
        raise UnrecordableError("padding stands between the tokens of a sliding-window layer")
    if step.is_packed:
        check_packed_mask(step, call, spec)
    else:
        check_mask(step, call, spec, offset)
    found = step.taken[layer] = _take(step, call, keeper, spec, (first, offset, index))
    return found


def _take(
    step: ActiveStep, call: Call, keeper: Keeper, spec: LayerSpec, where: tuple[int, int, int]
) -> Taken:
    """Given where the step's keys begin in k, the slot of k's first, and the layer in the cache."""
    first, offset, index = where
    kinds = kinds_of(step, keeper, spec)
    sinks = call.extra.get("s_aux")
    if sinks is not None:
        sinks = of_heads(sinks[None, :, None], spec, queries=True)[0, :, 0]
    summed = summed_prompts(step, keeper, call) if kinds else ()
    return Taken(
        spec,
        call.q if summed or "q" in kinds else None,
        call.k if summed or kinds & {"k", "key_norm"} else None,
        call.v if kinds & {"v", "value_norm"} else None,
        first,
        _hold(step, index),
        sinks,
        kinds,
        sum_rows(step, keeper, spec, call, offset, sinks) if kinds else None,
        summed,
    )


def _spec(model: ModelState, layer: int, call: Call, keeper: Keeper) -> LayerSpec:
    known = model.specs.get(layer)
    if known is None:
        whole = _describe_layer(model, layer, call)
        known = model.specs[layer] = choose_heads(
            place_heads(whole, call.module), keeper.selection.heads
        )
    return known


def _describe_layer(model: ModelState, layer: int, call: Call) -> LayerSpec:
    extra = call.extra
    # Continuous batching passes is_causal=False where its mask says so instead.
    causal = True if is_paged(extra) else extra.get("is_causal")
    causal = getattr(call.module, "is_causal", True) if causal is None else causal
    kind = "cross" if model.is_cross(call.module) else "full" if causal else "bidirectional"
    window = extra.get("sliding_window")
    if window is not None and not causal:
        raise UnrecordableError(f"layer {layer} slides in both directions")
    scaling, width = extra.get("scaling"), call.q.shape[3]
    softcap, slopes = extra.get("softcap"), extra.get("alibi_slopes")
    return LayerSpec(
        layer=layer,
        num_q_heads=call.q.shape[1],
        num_kv_heads=call.k.shape[1],
        head_dim=width,
        value_dim=call.v.shape[3],
        scale=float(width**-0.5 if scaling is None else scaling),
        attention_kind=kind if window is None else "sliding",
        sliding_window=None if window is None else int(window),
        softcap=None if softcap is None else float(softcap),
        has_sinks=extra.get("s_aux") is not None,
        rope_theta=model.rope_theta(call.module),
        name=model.name_of(call.module),
        alibi_slopes=None if slopes is None else tuple(slopes),
        position_bias=bias_table(model, layer, call),
    )


def _new_keys(step: ActiveStep, spec: LayerSpec, index: int, k: torch.Tensor) -> tuple[int, int]:
    """Where in k the step's own keys begin, and which slot of the sequence k begins with."""
    layer, total, held = spec.layer, step.past + step.length, k.shape[2]
    layers = getattr(step.cache, "layers", ())
    kept: Any = layers[index] if index < len(layers) else None
    form = _form(type(kept))
    # A static window is filled like any static layer; past its end it holds what slides.
    if form == "static" or (form == "static window" and total <= kept.max_cache_len):
        return step.past, 0
    if held < step.length or held > total or (step.cache is None and held != step.length):
        raise UnrecordableError(f"layer {layer} was given {held} keys after {total} tokens")
    slides = spec.sliding_window is not None or getattr(kept, "is_sliding", False)
    if held < total and not slides:
        raise UnrecordableError(f"layer {layer} was given {held} keys of {total} tokens")
    if form == "quantised" and step.past:
        step.record.caveat = QUANTISED.format(type(kept).__name__)
    return held - step.length, total - held


def _hold(step: ActiveStep, index: int) -> Hold:
    """How long the keys and values given to a layer stay as they are.

    A static window rolls in place and a quantised layer gives back rounded keys; of an offloaded
    one nothing must be held on the device.
    """
    if step.cache is None:
        return Hold.FRESH
    layers = getattr(step.cache, "layers", ())
    if index >= len(layers) or getattr(step.cache, "offloading", False):
        return Hold.BORROWED
    kept = _form(type(layers[index])) in ("growing", "static")
    return Hold.KEPT if kept else Hold.BORROWED


def _form(kept: type) -> str:
    """How a cache layer of this type hands keys to attention."""
    if kept not in _FORMS:
        names = {
            StaticSlidingWindowLayer: "static window",
            StaticLayer: "static",
            BaseQuantizedLayer: "quantised",
        }
        _FORMS[kept] = next((n for base, n in names.items() if issubclass(kept, base)), "growing")
    return _FORMS[kept]
