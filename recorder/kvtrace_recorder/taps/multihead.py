"""`nn.MultiheadAttention` where it calls no function that another tap sees.

In evaluation torch runs the attention, or a whole encoder layer, in one fused call, and returns
nothing from inside it: q, k and v are computed again from what the call was given, in the same
projection, so that they may differ from the fused ones by rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 - everybody's name for it

from kvtrace_recorder.session.session import Session
from kvtrace_recorder.session.step import ActiveStep
from kvtrace_recorder.taps.call import Call
from kvtrace_recorder.taps.fallback import CALLER, listening, observed, take
from kvtrace_recorder.taps.frames import calling_module
from kvtrace_recorder.taps.patch import Patch

#: The form of mask of a fused call that is [batch, key]; others are over pairs.
_KEYS = 1


def patches(session: Session) -> list[Patch]:
    """The patches of this tap: two fused functions, and the projection of the unfused one."""
    return [
        Patch(torch, "_native_multi_head_attention", _observer(session, _attention)),
        Patch(torch, "_transformer_encoder_layer_fwd", _observer(session, _encoder_layer)),
        Patch(F, "_in_projection_packed", _keeper(session)),
        Patch(F, "_in_projection", _keeper(session)),
    ]


def _keeper(session: Session) -> Callable[[Any], Any]:
    """Keeps what was projected: torch forgets k before the softmax at which the call is found."""

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def projection(*args: Any, **kwargs: Any) -> Any:
            found = original(*args, **kwargs)
            if torch.compiler.is_compiling():
                return found
            step = listening(session)
            if step is not None:
                step.projected = found
            return found

        return projection

    return make


def _observer(session: Session, read: Callable[..., Call | None]) -> Callable[[Any], Any]:
    def observe(
        session: Session,
        step: ActiveStep,
        args: tuple[Any, ...],
        _kwargs: dict[str, Any],
        _output: Any,
    ) -> None:
        module = calling_module(CALLER)
        with torch.no_grad():
            call = None if module is None else read(module, *args)
        if call is not None:
            take(session, step, call)

    return observed(session, observe)


def _attention(
    module: Any,
    query: torch.Tensor,
    _key: torch.Tensor,
    _value: torch.Tensor,
    _width: int,
    heads: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    _out_weight: torch.Tensor,
    _out_bias: torch.Tensor,
    mask: torch.Tensor | None = None,
    _need_weights: bool = True,
    _average: bool = True,
    form: int | None = None,
) -> Call | None:
    # Fused only where query, key and value are one tensor.
    return _call(module, query, heads, weight, bias, mask, form)


def _encoder_layer(
    layer: Any,
    given: torch.Tensor,
    width: int,
    heads: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    _out_weight: torch.Tensor,
    _out_bias: torch.Tensor,
    _use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    *rest: Any,
) -> Call | None:
    mask, form = rest[-2:]
    if norm_first:
        given = F.layer_norm(given, (width,), norm_weight, norm_bias, eps)
    return _call(getattr(layer, "self_attn", layer), given, heads, weight, bias, mask, form)


def _call(
    module: Any,
    given: torch.Tensor,
    heads: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None,
    form: int | None,
) -> Call:
    seen = None if mask is None else _seen(mask, form)
    if given.is_nested:
        lengths = torch.tensor([len(row) for row in given.unbind()], device=given.device)
        given = given.to_padded_tensor(0.0)
        seen = (torch.arange(given.shape[1], device=given.device) < lengths[:, None])[:, None, None]
    batch, length, width = given.shape
    projected = F.linear(given, weight, bias).view(batch, length, 3, heads, width // heads)
    q, k, v = projected.permute(2, 0, 3, 1, 4)
    return Call(module, q, k, v, seen, {"is_causal": False})


def _seen(mask: torch.Tensor, form: int | None) -> torch.Tensor:
    """[batch or 1, 1, query or 1, key]: fused calls hide where their mask is not zero."""
    seen = mask == 0
    if form == _KEYS:
        return seen[:, None, None, :]
    return seen[None, None] if seen.ndim == 2 else seen[:, :1]
