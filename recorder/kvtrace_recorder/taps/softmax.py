"""Attention that a model computes itself, found at its softmax.

No interface tells the operands there, but the code that calls the softmax holds them, under the
names that everybody gives them. Whether they are the right ones is not believed but computed: the
scores that the softmax is given must be their product.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch

from kvtrace_recorder.session.session import Session
from kvtrace_recorder.session.step import ActiveStep
from kvtrace_recorder.taps.bias import Doubles, hidden_below, measure
from kvtrace_recorder.taps.call import Call
from kvtrace_recorder.taps.fallback import CALLER, observed, take
from kvtrace_recorder.taps.frames import callers, module_of
from kvtrace_recorder.taps.guard import UnrecordableError
from kvtrace_recorder.taps.masks import is_check_due, sample_tokens
from kvtrace_recorder.taps.patch import Patch
from kvtrace_recorder.taps.rebind import rebound
from kvtrace_recorder.taps.settle import fullest, use

_Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
#: Names of queries, keys and values in the code of transformers, of torch and of tutorials.
_NAMES = (
    ("query", "key", "value"),
    ("query_states", "key_states", "value_states"),
    ("query_layer", "key_layer", "value_layer"),
    ("queries", "keys", "values"),
    ("q", "k", "v"),
    ("xq", "xk", "xv"),
    ("Q", "K", "V"),
)
#: What modules call the factor on their scores.
_SCALES = ("scaling", "scale", "softmax_scale", "inv_norm_factor")


@dataclass
class _Operands:
    module: torch.nn.Module
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scores: torch.Tensor


def patches(session: Session) -> list[Patch]:
    """The patches of this tap: `torch.nn.functional.softmax` and `torch.softmax`."""
    make = observed(session, _observe)
    return [*rebound(torch.nn.functional, "softmax", make), *rebound(torch, "softmax", make)]


def _observe(
    session: Session,
    step: ActiveStep,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    _output: Any,
) -> None:
    scores = args[0] if args else kwargs.get("input")
    if not isinstance(scores, torch.Tensor) or scores.ndim not in (3, 4) or scores.is_nested:
        return
    found = _operands(step, scores, CALLER)
    if found is None:
        return
    call = Call(found.module, found.q, found.k, found.v, None, {})
    if not step.batch or is_check_due(step):
        call.mask = found.scores[:, :1].detach() > hidden_below(found.scores.dtype)
    take(session, step, call, functools.partial(_explain, scores=found.scores))


def _operands(step: ActiveStep, scores: torch.Tensor, depth: int) -> _Operands | None:
    """The operands that the innermost frame to name some holds, where they fit the scores."""
    named: list[_Triple] = []
    batch = step.batch
    for frame in callers(depth + 1):
        held = frame.f_locals
        if not named:
            named = [*_projected(step, held), *_named(held)]
            if named and not batch:
                # torch's own code folds the heads into the batch, which it calls this.
                known = held.get("bsz")
                batch = known if isinstance(known, int) else len(named[0][0])
        module = module_of(frame)
        if module is not None:
            found = (_fitting(module, triple, scores, batch) for triple in named)
            return next((operands for operands in found if operands is not None), None)
    return None


def _named(held: Mapping[str, Any]) -> Iterator[_Triple]:
    """What may be q, k and v among a function's variables."""
    for names in _NAMES:
        q, k, v = (held.get(name) for name in names)
        if _is_operand(q) and _is_operand(k) and _is_operand(v):
            yield q, k, v


def _is_operand(x: Any) -> TypeGuard[torch.Tensor]:
    return isinstance(x, torch.Tensor) and x.ndim in (3, 4)


def _projected(step: ActiveStep, held: Mapping[str, Any]) -> list[_Triple]:
    """The operands of `F.multi_head_attention_forward`, which deletes its k before the softmax."""
    q, v = held.get("q"), held.get("v")
    if step.projected is None or "num_heads" not in held or q is None or v is None:
        return []
    k = step.projected[1]
    return [(q, k.reshape(len(k), *q.shape[::2]).transpose(0, 1), v)]


def _fitting(
    module: torch.nn.Module, named: _Triple, scores: torch.Tensor, batch: int
) -> _Operands | None:
    """Operands of four axes, where their shapes are those of the scores."""
    if not batch or any(len(x) % batch for x in (*named, scores)):
        return None
    q, k, v, scores = (
        x if x.ndim == 4 else x.reshape(batch, len(x) // batch, *x.shape[1:])
        for x in (*named, scores)
    )
    tall, wide = (scores.shape[3], q.shape[3]), (q.shape[3], scores.shape[3])
    if k.shape[2:] == wide and (wide != tall or not _is_upright(q, k, scores)):
        k = k.transpose(2, 3)
    fits = k.shape[2:] == tall and q.shape[2] == scores.shape[2] and v.shape[2] == k.shape[2]
    return _Operands(module, q, k, v, scores) if fits and not q.shape[1] % k.shape[1] else None


def _is_upright(q: torch.Tensor, k: torch.Tensor, scores: torch.Tensor) -> bool:
    """Whether a k of as many tokens as its width is [key, head_dim]: which product fits better."""
    seen = scores[0, 0] > hidden_below(scores.dtype)
    away = [
        _distance((q[0, 0] @ x)[seen].double(), scores[0, 0][seen].double())
        for x in (k[0, 0].T, k[0, 0])
    ]
    return away[0] < away[1]


def _distance(products: torch.Tensor, scores: torch.Tensor) -> float:
    """1 - the squared correlation."""
    both = torch.stack([products, scores])
    return 1 - float(torch.corrcoef(both)[0, 1] ** 2)


def _explain(step: ActiveStep, call: Call, scores: torch.Tensor) -> None:
    """Compare the scores of a few queries with the product of the operands."""
    known = step.model.specs.get(step.model.layer_of(call.module, call.nth))
    if known is not None and not is_check_due(step):
        return
    row, _ = fullest(step)
    k = _host(call.k[row])
    k = np.repeat(k, call.q.shape[1] // len(k), axis=0)
    scale = None if known is None else known.scale
    # The last query sees most keys; what it does not tell the others need not say either.
    for query in sample_tokens(step.real[row])[::-1]:
        given = _host(scores[row, :, query])
        seen = given > hidden_below(scores.dtype)
        if (seen != seen[:1]).any():
            raise UnrecordableError("the heads of an attention see different keys")
        products = np.einsum("hd,hkd->hk", _host(call.q[row, :, query]), k)[:, seen[0]]
        scales = _likely_scales(call) if scale is None else [scale]
        positions = np.flatnonzero(seen[0]).astype(np.float64)
        measured = measure(given[:, seen[0]], products, positions, scales, scores.dtype)
        if scale is None:
            scale = call.extra["scaling"] = measured.scale
            use(call, measured, None)
        elif not np.isclose(measured.scale, scale, rtol=1e-3):
            raise UnrecordableError("the scores of an attention differ in their scale")
        elif known is not None:
            use(call, measured, known)


def _likely_scales(call: Call) -> list[float]:
    found = [call.q.shape[3] ** -0.5, 1.0]
    found += [getattr(call.module, name, None) for name in _SCALES]
    return [float(x) for x in found if isinstance(x, float | int)]


def _host(x: torch.Tensor) -> Doubles:
    return np.asarray(x.detach().double().cpu().numpy())
