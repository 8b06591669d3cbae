"""Attention calls that no interface announces: common to the taps that find them."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from kvtrace_recorder.session.plain import shape_step
from kvtrace_recorder.session.session import Session
from kvtrace_recorder.session.step import ActiveStep
from kvtrace_recorder.taps.call import Call
from kvtrace_recorder.taps.guard import UnrecordableError
from kvtrace_recorder.taps.settle import settle

NAME = "attention"
#: Frames between what `observed` calls and the code that called the function.
CALLER = 2


def listening(session: Session) -> ActiveStep | None:
    """The running step, where a call is not already seen by another tap.

    Calls while autograd runs are those of gradient checkpointing: the step has seen them before.
    """
    step = session.attending
    if step is None or torch._C._current_graph_task_id() >= 0:
        return None
    return step


def observed(
    session: Session,
    observe: Callable[[Session, ActiveStep, tuple[Any, ...], dict[str, Any], Any], None],
    tracing: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None,
) -> Callable[[Any], Any]:
    """What makes, of a function that computes attention, one that is listened to.

    Parameters
    ----------
    session : Session
        The recording.
    observe : callable
        Given the recording, the step, the arguments and the result of a call. Between it and the
        caller stand the guard and this wrapper: `CALLER` frames.
    tracing : callable, optional
        Given the arguments instead, where torch.compile traces the call.
    """
    local = session.local

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def function(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            # Dynamo alone: the stages of a compiler behind it call this function, too.
            if torch.compiler.is_dynamo_compiling():
                if tracing is not None:
                    tracing(args, kwargs)
                return output
            # Most calls are inside one that another tap has seen.
            if local.attending is None or torch.compiler.is_compiling():
                return output
            step = listening(session)
            if step is not None:
                started = time.perf_counter_ns()
                session.guard.run(NAME, observe, session, step, args, kwargs, output)
                step.tap_ns += time.perf_counter_ns() - started
            return output

        return function

    return make


def take(
    session: Session,
    step: ActiveStep,
    call: Call,
    explain: Callable[[ActiveStep, Call], None] | None = None,
    output: torch.Tensor | None = None,
) -> None:
    """Take the rows of an attention call of the running step.

    Parameters
    ----------
    session : Session
        The recording.
    step : ActiveStep
        The step.
    call : Call
        Its mask is None or has four axes: bool, or added to the scaled scores.
    explain : callable, optional
        Says in the call's `extra` what its mask does not.
    output : torch.Tensor, optional
        What the call gave, [batch, query, q_head, value_dim].

    Notes
    -----
    A call over other tokens than the step's (an encoder inside the model, cross attention) is
    left out and noted.
    """
    if step.record.fault is not None:
        return
    try:
        if not step.batch:
            shape_step(session, step, call)
        q, k = call.q, call.k
        if q.shape[0] != step.batch or q.shape[2] != step.length or k.shape[2] < step.length:
            session.note_once(_left_out(step, call))
            return
        call.nth = step.attended[id(call.module)]
        step.attended[id(call.module)] += 1
        if not session.keeper.asks(step.model.layer_of(call.module, call.nth)):
            return
        if not step.real.any():
            # Every row of the batch has ended.
            call.mask = None
        else:
            if explain is not None:
                explain(step, call)
            settle(step, call)
    except UnrecordableError as error:
        step.record.fault = str(error)
        return
    session.attended(step, call)
    if output is not None:
        session.returned(step, call, output)


def _left_out(step: ActiveStep, call: Call) -> str:
    return (
        f"{type(call.module).__name__} of {step.model.info.columns['architecture']} attended from"
        f" {call.q.shape[0]} x {call.q.shape[2]} to {call.k.shape[2]} tokens while the model ran"
        f" over {step.batch} x {step.length}; such layers are not recorded"
    )
