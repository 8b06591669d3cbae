"""Where a step begins and ends: the call of a model."""

from __future__ import annotations

import functools
import os
import time
from typing import Any

import torch
from torch._dynamo.eval_frame import OptimizedModule
from transformers.modeling_utils import PreTrainedModel

from kvtrace_recorder.session.session import Session
from kvtrace_recorder.taps.patch import Patch

NAME = "model forward"


def patches(session: Session) -> list[Patch]:
    """The patches of this tap: `__call__` of every transformers model, or of the model's class.

    At class level rather than by hooks on one model, so that a model nobody named is found at
    its first call; hooks on all modules would put every linear layer on torch's slow call path.
    """
    local = session.local

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            # What runs inside a step begins none.
            if (
                torch.compiler.is_compiling()
                or local.step is not None
                or not _begins(session, self)
            ):
                return original(self, *args, **kwargs)
            return _observed(session, original, self, args, kwargs)

        return call

    owner = PreTrainedModel if session.plain is None else type(session.plain)
    return [
        Patch(owner, "__call__", make),
        Patch(OptimizedModule, "__call__", _compiled_maker(session)),
        Patch(PreTrainedModel, "get_compiled_call", _generation_maker(session)),
        # Last: transformers' models have their own, which does not go by this one.
        *_found_patches(session),
    ]


def _found_patches(session: Session) -> list[Patch]:
    """Of programs that name no model: the calls of all modules, until one shows what to record."""
    if session.found is None:
        return []
    local = session.local

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or local.inside or not _begins(session, self):
                return original(self, *args, **kwargs)
            return _observed(session, original, self, args, kwargs)

        return call

    session.found.patch = Patch(torch.nn.Module, "__call__", make)
    return [session.found.patch]


def _compiled_maker(session: Session) -> Any:
    """What torch.compile returns calls the model it holds out of Python's sight."""

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            inner = self if self is session.plain else self._orig_mod
            if torch.compiler.is_compiling() or not _begins(session, inner):
                return original(self, *args, **kwargs)
            run = functools.partial(original, self)
            return _observed(session, lambda _, *a, **k: run(*a, **k), inner, args, kwargs)

        return call

    return make


def _generation_maker(session: Session) -> Any:
    """`generate` compiles the bound call of a model for itself."""

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def get_compiled_call(self: Any, *args: Any, **kwargs: Any) -> Any:
            compiled = original(self, *args, **kwargs)

            def call(*a: Any, **k: Any) -> Any:
                if not _begins(session, self):
                    return compiled(*a, **k)
                return _observed(session, lambda _, *x, **y: compiled(*x, **y), self, a, k)

            return call

        return get_compiled_call

    return make


def _begins(session: Session, model: Any) -> bool:
    if not session.is_running or os.getpid() != session.pid or _is_recomputing():
        return False
    return bool(session.guard.run(NAME, session.begins_step, model))


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
