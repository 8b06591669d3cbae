"""Attention inside code that torch.compile has made: a custom operator beside each call.

Taps are Python, and compiled code runs none. While torch traces a model the taps put an operator
into the graph, which at run time copies its operands in eager code; it is said to write into a
tensor of ours, else the compiler would drop an operator whose result nobody reads. A model that
was compiled before is traced anew when it next runs, since torch guards the functions that
recording rebinds, and afterwards runs the code it had before.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from kvtrace_recorder.taps.call import Call
from kvtrace_recorder.taps.fallback import take
from kvtrace_recorder.taps.guard import UnrecordableError
from kvtrace_recorder.taps.patch import Patch

if TYPE_CHECKING:
    from kvtrace_recorder.session.session import Session
    from kvtrace_recorder.session.step import ActiveStep

NAME = "attention"
#: Layer of an attention call that does not say which it is.
UNKNOWN = -1
_SCHEMA = (
    "(Tensor(a!) mark, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? sinks, int layer,"
    " bool? causal, float? scaling, int? window, float? softcap, bool biased) -> ()"
)
#: What the operator is said to write into.
_mark = torch.zeros(1)
#: Whether a call is being traced that another operator sees; torch traces this variable, too.
_is_announced = False
#: The recording that runs.
_session: Session | None = None


def patches(session: Session) -> list[Patch]:
    """The patch of this tap: who is told, in this module itself."""
    return [Patch(sys.modules[__name__], "_session", lambda _: session)]


#: A CUDA graph replays kernels and no Python: the operator stays out of it. Operands are read in
#: whatever order they lie: to order them anew would change the code around them.
_TAGS = [getattr(torch.Tag, name, None) for name in ("cudagraph_unsafe", "flexible_layout")]


@torch.library.custom_op(
    "kvtrace::attended",
    mutates_args=("mark",),
    schema=_SCHEMA,
    tags=tuple(tag for tag in _TAGS if tag),
)
def _attended(
    mark: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    layer: int,
    causal: bool | None,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    biased: bool,
) -> None:
    session = _session
    step = None if session is None else session.attending
    if session is None or step is None:
        return
    started = time.perf_counter_ns()
    extra = {
        "scaling": scaling,
        "sliding_window": window,
        "softcap": softcap,
        "s_aux": sinks,
        "is_causal": causal,
        "position_bias": biased or None,
    }
    session.guard.run(NAME, _take, session, step, Call(None, q, k, v, mask, extra), layer)
    step.tap_ns += time.perf_counter_ns() - started


@_attended.register_fake
def _(*_args: Any) -> None:
    return None


def _take(session: Session, step: ActiveStep, call: Call, layer: int) -> None:
    number = layer if layer != UNKNOWN else step.attended[UNKNOWN]
    step.attended[UNKNOWN] += layer == UNKNOWN
    try:
        call.module = step.model.layer_module(number)
    except UnrecordableError as error:
        step.record.fault = str(error)
        return
    if step.model.is_plain:
        del call.extra["sliding_window"]
        take(session, step, call)
    else:
        session.attended(step, call)
    taken = step.taken.get(step.model.layer_of(call.module, call.nth))
    if taken is not None:
        # Compiled code uses its memory again as soon as the operator has returned.
        taken.own(step.length)
    session.settle()


def announce(
    function: Callable[..., Any],
    module: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Any,
    extra: dict[str, Any],
) -> Any:
    """Call a function of transformers' attention interface, and put its operator into the graph."""
    global _is_announced
    _is_announced = True
    output = function(module, q, k, v, mask, **extra)
    _is_announced = False
    _operator(module, q, k, v, mask, extra)
    return output


def _operator(
    module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, extra: dict[str, Any]
) -> None:
    layer = getattr(module, "layer_idx", None)
    scaling, window = extra.get("scaling"), extra.get("sliding_window")
    softcap, causal = extra.get("softcap"), extra.get("is_causal")
    _attended(
        _mark,
        q,
        k,
        v,
        mask if isinstance(mask, torch.Tensor) else None,
        extra.get("s_aux"),
        UNKNOWN if layer is None else layer,
        getattr(module, "is_causal", True) if causal is None else causal,
        None if scaling is None else float(scaling),
        window,
        None if softcap is None else float(softcap),
        extra.get("position_bias") is not None,
    )


def unannounced(given: dict[str, Any]) -> None:
    """Put the operator of a call of `F.scaled_dot_product_attention` into the graph."""
    q, k, v, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
    if _is_announced or q.ndim != 4:
        return
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
    scale, causal = given.get("scale"), bool(given.get("is_causal"))
    _attended(_mark, q, k, v, mask, None, UNKNOWN, causal, scale, None, None, False)
