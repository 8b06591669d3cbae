"""The next plain decode step of a sequence, known from the last one.

Nearly every step of a run adds one token to one sequence, with nothing else changed. What the
general way finds out about such a step is the same each time, and at the speed of a small model
finding it out costs more than all the rest. So the first such step leaves a plan, and the steps
after it only check that they fit. Whatever does not fit goes the general way, as does every
`CHECK_EVERY`th step, and any change of the cache ends the plan.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from kvtrace.writer import LayerSpec
from kvtrace_recorder.messages import LayerGrowth, Sequenced, StepRecord
from kvtrace_recorder.session.cache_sizes import growth_of
from kvtrace_recorder.session.keeping import Keeper, Plan
from kvtrace_recorder.session.models import ModelState
from kvtrace_recorder.session.requests import CacheEntry
from kvtrace_recorder.session.step import ActiveStep, Hold, Taken
from kvtrace_recorder.taps.call import Call
from kvtrace_recorder.taps.masks import CHECK_EVERY

_ONE = np.ones((1, 1), bool)


@dataclass(slots=True)
class LayerPlan:
    """What a layer's attention call of a plain decode step looks like.

    Attributes
    ----------
    spec : LayerSpec
        The layer.
    kept : tuple of bool
        Whether q, k and v are kept, each whole.
    is_static : bool
        Whether k and v are as long as the cache has room, whatever it holds.
    shape : torch.Size
        Of q.
    sinks : torch.Tensor or None
        As in `Taken`.
    kinds : frozenset of str
        Likewise.
    """

    spec: LayerSpec
    kept: tuple[bool, bool, bool]
    is_static: bool
    shape: torch.Size
    sinks: torch.Tensor | None
    kinds: frozenset[str]

    @classmethod
    def of(cls, step: ActiveStep, call: Call, taken: Taken) -> LayerPlan | None:
        """From a call that went the general way; None where the next may look different."""
        whole = all(
            mine is None or mine is given
            for mine, given in ((taken.q, call.q), (taken.k, call.k), (taken.v, call.v))
        )
        if not whole or taken.hold is not Hold.KEPT or call.nth or taken.spec.sliding_window:
            return None
        held = call.k.shape[2]
        kept = (taken.q is not None, taken.k is not None, taken.v is not None)
        is_static = held != step.past + 1
        return cls(taken.spec, kept, is_static, call.q.shape, taken.sinks, taken.kinds)

    def take(self, past: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Taken | None:
        """The call's rows; None where it does not look as it should."""
        if q.shape != self.shape or (k.shape[2] != past + 1 and not self.is_static):
            return None
        has_q, has_k, has_v = self.kept
        return Taken(
            self.spec,
            q if has_q else None,
            k if has_k else None,
            v if has_v else None,
            past,
            Hold.KEPT,
            self.sinks,
            self.kinds,
        )


@dataclass(slots=True)
class DecodePlan:
    """What the next plain decode step of a cache looks like.

    Attributes
    ----------
    model : ModelState
        The model.
    layers : dict of int to LayerPlan or None
        By the attention module's id.
    keeps, kept_bytes
        As in `ActiveStep`.
    growth : tuple of LayerGrowth
        What the step adds to the cache's memory; empty where that is to be looked at.
    """

    model: ModelState
    layers: dict[int, LayerPlan | None] = field(default_factory=dict)
    keeps: Plan | None = None
    kept_bytes: int = 0
    growth: tuple[LayerGrowth, ...] = ()


def learn(step: ActiveStep, call: Call, taken: Taken) -> None:
    """Keep what a general step's attention call looked like, where the next may look the same."""
    if step.length == step.batch == 1 and step.past and step.entry.plan is None:
        if step.plan is None:
            step.plan = DecodePlan(step.model)
        step.plan.layers[id(call.module)] = LayerPlan.of(step, call, taken)


def settle_plan(step: ActiveStep, *, has_rows: bool) -> None:
    """Let the step's plan stand for the next, where the whole step was plain.

    Parameters
    ----------
    step : ActiveStep
        A step that has ended.
    has_rows : bool
        Whether layers' rows are recorded; else a plan needs none.
    """
    plan, entry = step.plan, step.entry
    if entry.plan is not None:
        return
    if not has_rows and step.length == step.batch == 1 and step.past:
        plan = DecodePlan(step.model)
    plain = (
        plan is not None
        and step.record.fault is None
        and step.record.caveat is None
        and step.keep is None
        and step.half is None
        and not step.is_packed
        and len(plan.layers) == len(step.taken)
        and None not in plan.layers.values()
    )
    if plan is not None and plain:
        plan.keeps, plan.kept_bytes = step.keeps, step.kept_bytes
        plan.growth = () if step.cache is None else growth_of(step)
        entry.plan = plan


def next_step(
    entry: CacheEntry, cache: Any, kwargs: dict[str, Any], keeper: Keeper
) -> ActiveStep | None:
    """The step that a model is called for; None where it must be looked at the general way.

    Parameters
    ----------
    entry : CacheEntry
        The cache's, with a plan.
    cache : transformers Cache
        As the model is given it.
    kwargs : dict
        All that the model is given.
    keeper : Keeper
        Says whether the trace has room for as much again.
    """
    plan, past, ids = entry.plan, entry.slots, kwargs.get("input_ids")
    if (
        plan is None
        or entry.steps % CHECK_EVERY == 1
        or entry.reason is not None
        or ids is None
        or ids.shape != (1, 1)
        or cache.get_seq_length() != past
        or not _shows(kwargs.get("attention_mask"), past)
        or not keeper.repeat(plan.keeps, plan.kept_bytes)
    ):
        return None
    started = time.time_ns()
    state = entry.requests[0]
    entry.real = np.concatenate((entry.real, _ONE), axis=1)
    sequence = Sequenced(state.request, 0, state.tokens, 1, False, state.prompt_tokens)
    record = StepRecord("decode", 1, 1, started, sequences=(sequence,), token_ids=[ids.item()])
    step = ActiveStep(plan.model, record, 1, 1, past, cache, entry, _ONE, None)
    step.plan = plan
    step.keeps, step.kept_bytes = plan.keeps, plan.kept_bytes
    return step


def note_growth(step: ActiveStep, cache: Any) -> bool:
    """Note that a step has grown its cache as planned; False where that is to be looked at."""
    plan, entry, slots = step.entry.plan, step.entry, step.past + 1
    if plan is None or step.plan is not plan or not plan.growth:
        return False
    if cache.get_seq_length() != slots:
        return False
    step.record.slots = entry.grown_to = slots
    return True


def _shows(mask: Any, past: int) -> bool:
    """Whether a mask shows the step's token; as far as is plain to see."""
    if mask is None:
        return True
    return (
        isinstance(mask, torch.Tensor) and mask.shape == (1, past + 1) and mask[0, past].item() == 1
    )
