"""Where a step begins and ends: the call of a model."""

from __future__ import annotations

import functools
import os
import time
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel

from kvtrace_recorder.session.session import Session
from kvtrace_recorder.taps.patch import Patch

NAME = "model forward"


def patches(session: Session) -> list[Patch]:
    """The patches of this tap: `__call__` of every transformers model, or of the model's class.

    At class level rather than by hooks on one model, so that a model nobody named is found at
    its first call; hooks on all modules would put every linear layer on torch's slow call path.
    """

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if (
                torch.compiler.is_compiling()
                or os.getpid() != session.pid
                or _is_recomputing()
                or not session.guard.run(NAME, session.begins_step, self)
            ):
                return original(self, *args, **kwargs)
            return _observed(session, original, self, args, kwargs)

        return call

    classes = [PreTrainedModel] if session.plain is None else [type(session.plain)]
    return [Patch(owner, "__call__", make) for owner in classes]


def _is_recomputing() -> bool:
    """Whether a backward pass runs a checkpointed part of the model once more."""
    return bool(torch._C._current_graph_task_id() >= 0)


def _observed(
    session: Session, original: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    step = session.guard.run(NAME, session.begin, model, args, kwargs)
    # Also where the call is not recorded: the models inside it are part of it.
    around = session.enter_call(step)
    started = time.perf_counter_ns()
    try:
        output = original(model, *args, **kwargs)
    except BaseException:
        session.leave_call(around)
        if step is not None and os.getpid() == session.pid:
            session.guard.run(NAME, session.abandon, step)
        raise
    elapsed = time.perf_counter_ns() - started
    session.leave_call(around)
    # A model may fork while it runs, and the step is the parent's.
    if step is not None and os.getpid() == session.pid:
        session.guard.run(NAME, session.end, step, output, elapsed)
    return output
