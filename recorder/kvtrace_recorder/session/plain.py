"""Steps whose inputs do not say what they are over: it shows in their attention.

Such are those of models that are not transformers', and of encoders of sounds or pictures. The
first attention call tells the batch and the tokens; every step is a whole sequence, for nothing
says where such a model keeps keys from one call to the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvtrace_recorder.session.inputs import StepInputs
from kvtrace_recorder.session.requests import Bools
from kvtrace_recorder.taps.bias import hidden_below

if TYPE_CHECKING:
    from kvtrace_recorder.session.models import ModelState
    from kvtrace_recorder.session.session import Session
    from kvtrace_recorder.session.step import ActiveStep
    from kvtrace_recorder.taps.call import Call


def begin_unshaped(
    session: Session, model: ModelState, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ActiveStep:
    """Begin a step whose shape its first attention call will tell."""
    nothing = StepInputs(None, 0, 0, None, None, 0)
    step = session.new_step(model, nothing, session.new_entry(0), np.ones((0, 0), bool))
    first = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)
    if first is not None and first.dtype == torch.int64 and first.ndim == 2:
        step.ids = first.cpu().numpy()
    return step


def shape_step(session: Session, step: ActiveStep, call: Call) -> None:
    """Give a step the batch and the tokens of its first attention call."""
    batch, _, length, _ = call.q.shape
    ids = step.ids
    if ids is not None and ids.shape != (batch, length):
        ids = None
    inputs = StepInputs(ids, batch, length, None, None, 0)
    entry = session.new_entry(batch)
    shaped = session.new_step(step.model, inputs, entry, _tokens(call))
    shaped.record.started_ns = step.record.started_ns
    shaped.half = step.half
    vars(step).update(vars(shaped))


def _tokens(call: Call) -> Bools:
    """[batch, token]: which tokens are no padding: some query sees them."""
    batch, _, length, _ = call.q.shape
    mask = call.mask
    if mask is None or mask.shape[3] != length:
        return np.ones((batch, length), bool)
    seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > hidden_below(mask.dtype)
    found: NDArray[np.bool_] = seen.any(dim=1).cpu().numpy()
    return np.broadcast_to(found, (batch, length)).copy()
