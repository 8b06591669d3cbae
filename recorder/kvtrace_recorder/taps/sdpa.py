"""Calls of `torch.nn.functional.scaled_dot_product_attention` from anywhere in a model."""

from __future__ import annotations

from typing import Any

import torch

from kvtrace_recorder.session.session import Session
from kvtrace_recorder.session.step import ActiveStep
from kvtrace_recorder.taps.call import Call
from kvtrace_recorder.taps.compiled import unannounced
from kvtrace_recorder.taps.fallback import CALLER, observed, take
from kvtrace_recorder.taps.frames import calling_module
from kvtrace_recorder.taps.patch import Patch
from kvtrace_recorder.taps.rebind import rebound

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def patches(session: Session) -> list[Patch]:
    """The patches of this tap: the function, wherever it was imported to."""
    make = observed(session, _observe, _trace)
    return rebound(torch.nn.functional, "scaled_dot_product_attention", make)


def _trace(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    unannounced(_given(args, kwargs))


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(_NAMES, args, strict=False)) | kwargs


def _observe(
    session: Session,
    step: ActiveStep,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: torch.Tensor,
) -> None:
    module = calling_module(CALLER)
    given = _given(args, kwargs)
    q, k, v = (with_heads(given[name]) for name in ("query", "key", "value"))
    if module is None or q is None or k is None or v is None:
        return
    mask = given.get("attn_mask")
    if mask is not None:
        # Broadcast as the kernel does: missing axes are at the front.
        mask = mask.reshape((1,) * (q.ndim - mask.ndim) + tuple(mask.shape))
    extra = {"scaling": given.get("scale"), "is_causal": bool(given.get("is_causal"))}
    heard = with_heads(output)
    given_back = None if heard is None else heard.transpose(1, 2)
    take(session, step, Call(module, q, k, v, mask, extra), output=given_back)


def with_heads(x: torch.Tensor) -> torch.Tensor | None:
    """[batch, head, token, width]; a call without an axis of heads has one; None where unclear."""
    if x.is_nested or x.ndim not in (3, 4):
        return None
    return x if x.ndim == 4 else x[:, None]
