"""From the operands of an attention call to the rows of a trace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import BaseQuantizedLayer, StaticLayer, StaticSlidingWindowLayer

from kvtrace.writer import LayerSpec
from kvtrace_recorder.messages import Array, LayerRows
from kvtrace_recorder.session.models import ModelState
from kvtrace_recorder.session.step import ActiveStep
from kvtrace_recorder.taps.guard import UnrecordableError
from kvtrace_recorder.taps.masks import check_mask

_NAMES = ("module", "query", "key", "value", "attention_mask")
DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Call:
    """An attention call.

    Attributes
    ----------
    module : torch.nn.Module
        The attention layer.
    q, k, v : torch.Tensor
        [batch, q_head, query, head_dim], [batch, kv_head, key, head_dim or value_dim].
    mask : torch.Tensor or None
        Whatever the kernel takes.
    extra : dict
        scaling, sliding_window, softcap, s_aux and the rest.
    """

    module: Any
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: Any
    extra: dict[str, Any]


def parse_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Name the operands of an attention function's call."""
    named = dict(zip(_NAMES, args, strict=False))
    extra = {name: value for name, value in kwargs.items() if name not in _NAMES}
    named |= {name: value for name, value in kwargs.items() if name in _NAMES}
    return Call(
        module=named["module"],
        q=named["query"],
        k=named["key"],
        v=named["value"],
        mask=named.get("attention_mask"),
        extra=extra,
    )


def take_rows(step: ActiveStep, call: Call, kinds: tuple[str, ...], dtype: str) -> None:
    """Put one layer's rows of the running step into its record.

    Raises
    ------
    UnrecordableError
        Where the rows or what they attended to cannot be known.
    """
    layer = step.model.layer_of(call.module)
    if layer in step.record.layers:
        raise UnrecordableError(
            f"layer {layer} attended twice in one step; cross attention is not recorded"
        )
    if call.q.ndim != 4 or call.q.shape[0] != step.batch or call.q.shape[2] != step.length:
        raise UnrecordableError(
            f"layer {layer} had queries of shape {tuple(call.q.shape)} in a step of"
            f" {step.batch} x {step.length} tokens"
        )
    spec = _spec(step.model, layer, call)
    first, offset = _new_keys(step, layer, call.k)
    if spec.sliding_window is not None and not step.entry.is_contiguous:
        raise UnrecordableError("padding stands between the tokens of a sliding-window layer")
    check_mask(step, call, spec, offset)
    sinks = call.extra.get("s_aux")
    host = {
        kind: _to_host(tensor, start, step, DTYPES[dtype])
        for kind, tensor, start in (("q", call.q, 0), ("k", call.k, first), ("v", call.v, first))
        if kind in kinds
    }
    step.record.layers[layer] = LayerRows(
        spec,
        host.get("q"),
        host.get("k"),
        host.get("v"),
        None if sinks is None else sinks.detach().float().cpu().numpy(),
    )


def _spec(model: ModelState, layer: int, call: Call) -> LayerSpec:
    known = model.specs.get(layer)
    if known is None:
        known = model.specs[layer] = _describe_layer(model, layer, call)
    return known


def _describe_layer(model: ModelState, layer: int, call: Call) -> LayerSpec:
    extra = call.extra
    if extra.get("position_bias") is not None:
        raise UnrecordableError(f"layer {layer} adds a position bias to its scores")
    causal = extra.get("is_causal")
    causal = getattr(call.module, "is_causal", True) if causal is None else causal
    window = extra.get("sliding_window")
    if window is not None and not causal:
        raise UnrecordableError(f"layer {layer} slides in both directions")
    scaling, width = extra.get("scaling"), call.q.shape[3]
    softcap = extra.get("softcap")
    return LayerSpec(
        layer=layer,
        num_q_heads=call.q.shape[1],
        num_kv_heads=call.k.shape[1],
        head_dim=width,
        value_dim=call.v.shape[3],
        scale=float(width**-0.5 if scaling is None else scaling),
        attention_kind="bidirectional" if not causal else "full" if window is None else "sliding",
        sliding_window=None if window is None else int(window),
        softcap=None if softcap is None else float(softcap),
        has_sinks=extra.get("s_aux") is not None,
        rope_theta=model.rope_theta(call.module),
    )


def _new_keys(step: ActiveStep, layer: int, k: torch.Tensor) -> tuple[int, int]:
    """Where in k the step's own keys begin, and which slot of the sequence k begins with."""
    total, held = step.past + step.length, k.shape[2]
    layers = getattr(step.cache, "layers", ())
    kept = layers[layer] if layer < len(layers) else None
    if isinstance(kept, StaticSlidingWindowLayer | BaseQuantizedLayer):
        raise UnrecordableError(f"layer {layer} keeps its keys in a {type(kept).__name__}")
    if isinstance(kept, StaticLayer):
        return step.past, 0
    if held < step.length or held > total or (step.cache is None and held != step.length):
        raise UnrecordableError(f"layer {layer} was given {held} keys after {total} tokens")
    return held - step.length, total - held


def _to_host(tensor: torch.Tensor, start: int, step: ActiveStep, dtype: torch.dtype) -> Array:
    """[row, head, width] of the step's own tokens, a copy in the storage type."""
    rows = tensor.detach()[:, :, start : start + step.length].transpose(1, 2)
    batch, length, heads, width = rows.shape
    # One pass that orders, narrows and copies; the model may reuse its own memory afterwards.
    narrowed = torch.empty((batch, length, heads, width), dtype=dtype, device=rows.device)
    narrowed.copy_(rows)
    flat = narrowed.view(batch * length, heads, width)
    if step.keep is not None:
        flat = flat.index_select(0, step.keep.to(flat.device))
    found: Array = flat.cpu().numpy()
    return found
