"""What every attention call was given: the operands of `AttentionInterface`'s functions."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_utils import AttentionInterface

from kvtrace_recorder.session.session import Session
from kvtrace_recorder.taps.call import parse_call
from kvtrace_recorder.taps.compiled import announce
from kvtrace_recorder.taps.patch import Patch

NAME = "attention"


def patches(session: Session) -> list[Patch]:
    """The patch of this tap: the look-up of the attention function, at class level.

    Registering an attention function of our own would change how masks are made, and so the
    kernel that runs.
    """
    local = session.local

    def make(original: Any) -> Any:
        def get_interface(self: Any, *args: Any, **kwargs: Any) -> Any:
            function = original(self, *args, **kwargs)
            if torch.compiler.is_dynamo_compiling():
                return _traced(function)
            if local.attending is None or torch.compiler.is_compiling():
                return function
            return _observed(session, function)

        return get_interface

    return [Patch(AttentionInterface, "get_interface", make)]


def _traced(function: Callable[..., Any]) -> Callable[..., Any]:
    def attention(module: Any, q: Any, k: Any, v: Any, mask: Any, **extra: Any) -> Any:
        return announce(function, module, q, k, v, mask, extra)

    return attention


def _observed(session: Session, function: Callable[..., Any]) -> Callable[..., Any]:
    local = session.local

    def attention(*args: Any, **kwargs: Any) -> Any:
        step = local.attending
        if step is None:
            return function(*args, **kwargs)
        # What it calls inside is this call: the other taps need not hear it.
        local.attending = None
        try:
            output = function(*args, **kwargs)
        finally:
            local.attending = step
        run = step.run
        if run is None or len(args) != 5 or not session.guard.run(NAME, run.saw, *args):
            started = time.perf_counter_ns()
            session.guard.run(NAME, session.attention, step, args, kwargs)
            step.tap_ns += time.perf_counter_ns() - started
        if session.samples is not None:
            session.returned(step, parse_call(args, kwargs), output)
        return output

    return attention
