"""A run of plain decode steps: one token more of one sequence, with nothing else changed.

Nearly every step is such a one. What the general way finds out about it is the same each time,
and at the speed of a small model finding it out costs more than all the rest: code that runs once
a layer finds the caches of the processor full of the model's weights. So the first such step
leaves a run, the steps after it only check that they fit, and what they are is kept in columns.
Whatever does not fit goes the general way, as does any change of the cache, and ends the run.
"""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvtrace_recorder.messages import CacheEvent, DecodeSteps, Sequenced, StepRecord
from kvtrace_recorder.session.cache_sizes import growth_of, sizes_after
from kvtrace_recorder.session.keeping import Keeper
from kvtrace_recorder.session.off_device import Ran
from kvtrace_recorder.session.run_rows import LayerRun, RunRows
from kvtrace_recorder.session.step import ActiveStep, Hold, Taken
from kvtrace_recorder.taps.call import Call
from kvtrace_recorder.taps.keep import is_off_host
from kvtrace_recorder.taps.masks import CHECK_EVERY

if TYPE_CHECKING:
    from kvtrace_recorder.session.held import HeldSteps

_ONE = np.ones((1, 1), bool)


@dataclass(slots=True)
class RunLayer:
    """An attention call of a plain decode step, and what the steps of a run gave it.

    Attributes
    ----------
    module : torch.nn.Module
        The attention layer.
    taken : Taken or None
        What was taken of it in the step before the run, of tensors only whether there were any;
        None for a layer that is not recorded.
    shape : torch.Size
        Of q.
    is_static : bool
        Whether k and v are as long as the cache has room, whatever it holds.
    is_masked : bool
        Whether it was given a mask.
    queries : list of torch.Tensor
        [step] of [1, q_head, 1, head_dim], not sent yet; empty where queries are not kept.
    keys, values : torch.Tensor or None
        As the newest step had them: they have the earlier steps' tokens, too.
    """

    module: Any
    taken: Taken | None
    shape: torch.Size
    is_static: bool
    is_masked: bool
    queries: list[torch.Tensor]
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None

    @classmethod
    def of(cls, step: ActiveStep, call: Call, taken: Taken | None) -> RunLayer | None:
        """From a call that went the general way; None where the next may look different."""
        if taken is not None:
            whole = all(
                mine is None or mine is given
                for mine, given in ((taken.q, call.q), (taken.k, call.k), (taken.v, call.v))
            )
            same = (
                taken.hold is Hold.KEPT and taken.sums is None and not taken.summed and not call.nth
            )
            if not whole or not same or taken.spec.sliding_window:
                return None
            # What was taken, without its tensors: they would be the cache a second time.
            taken = replace(taken, q=_empty(taken.q), k=_empty(taken.k), v=_empty(taken.v))
        is_static = call.k.shape[2] != step.past + 1
        return cls(call.module, taken, call.q.shape, is_static, call.mask is not None, [])

    def of_step(self, past: int) -> Taken | None:
        """What the running step gave, as the general way holds it."""
        if self.taken is None:
            return None
        was = self.taken
        q = self.queries.pop() if was.q is not None else None
        k = None if was.k is None else self.keys
        v = None if was.v is None else self.values
        return Taken(was.spec, q, k, v, past, Hold.KEPT, was.sinks, was.kinds)

    def rows(self, steps: int) -> LayerRun | None:
        """What the first steps gave, which are held no more; any thread."""
        was = self.taken
        if was is None:
            return None
        # The running step may append meanwhile.
        queries = self.queries[:steps]
        del self.queries[:steps]
        keys = None if was.k is None else self.keys
        return LayerRun(was, queries, keys, None if was.v is None else self.values)


class DecodeRun:
    """Plain decode steps of one cache, one after the other.

    Parameters
    ----------
    step : ActiveStep
        The step before, which went the general way and has ended.
    layers : list of RunLayer
        Its attention calls in their order; none where no rows are kept.
    held : HeldSteps
        Sends what the run holds.
    """

    def __init__(self, step: ActiveStep, layers: list[RunLayer], held: HeldSteps) -> None:
        self.entry, self.model = step.entry, step.model
        self.module = step.model.module
        self.cache = weakref.ref(step.cache)
        self.growth = growth_of(step)
        self.layers, self._held = layers, held
        self._state = state = step.entry.requests[0]
        self._sequence = Sequenced(state.request, 0, state.tokens, 1, False, state.prompt_tokens)
        record = StepRecord("decode", 1, 1, 0, sequences=(self._sequence,), token_ids=[0])
        #: The running step: the same each time, since making one costs more than all of this.
        self.step = ActiveStep(step.model, record, 1, 1, 0, None, step.entry, _ONE, None, run=self)
        self.step.keeps, self.step.kept_bytes = step.keeps, step.kept_bytes
        #: Attention calls of the running step so far.
        self._calls = 0
        self._checks = False
        given = (x for one in layers if one.taken for x in (one.taken.q, one.taken.k, one.taken.v))
        #: Where the rows lie, other than the host; what the last step left there; and whether a
        #: step runs there.
        self.devices = {x.device for x in given if x is not None and is_off_host(x)}
        self.ran: Ran | None = None
        self.is_running = False
        #: Of the steps that are not sent yet; `durations` last, whose length is their number.
        self.started: list[int] = []
        self.tokens: list[int] = []
        self.events: list[list[CacheEvent]] = []
        self.durations: list[int] = []
        #: Where the first of those stands: its position, and its slot in the cache.
        self._position, self._slot = state.tokens, step.entry.slots

    def next(self, cache: Any, inputs: dict[str, Any], keeper: Keeper) -> ActiveStep | None:
        """The step that a model is called for; None where it must be looked at the general way.

        Parameters
        ----------
        cache : transformers Cache
            The run's, as the model is given it.
        inputs : dict
            All that the model is given.
        keeper : Keeper
            Says whether the trace has room for as much again.
        """
        entry, step, ids = self.entry, self.step, inputs.get("input_ids")
        past = entry.slots
        if (
            ids is None
            or ids.shape != (1, 1)
            or cache.get_seq_length() != past
            or entry.lost is not None
            or self._state.lost is not None
            or not _shows(inputs.get("attention_mask"), past)
            or not keeper.repeat(step.keeps, step.kept_bytes)
        ):
            return None
        if self.devices:
            self._held.starts(self)
        step.cache, step.past, step.tap_ns, step.is_sampled = cache, past, 0, None
        step.record.started_ns = time.time_ns()
        step.record.token_ids = [ids.item()]
        self._sequence.position = self._state.tokens
        self._calls, self._checks = 0, entry.steps % CHECK_EVERY == 1
        return step

    def saw(
        self, module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any
    ) -> bool:
        """An attention layer has run; False where its call does not look as it should."""
        if self._calls == len(self.layers):
            return False
        layer = self.layers[self._calls]
        if (
            module is not layer.module
            or q.shape != layer.shape
            or (k.shape[2] != self.step.past + 1 and not layer.is_static)
            or (mask is not None and (self._checks or not layer.is_masked))
        ):
            return False
        if layer.taken is not None:
            if layer.taken.q is not None:
                layer.queries.append(q)
            # Held until the step has ended, the older ones would be the cache a second time.
            layer.keys, layer.values = k, v
        self._calls += 1
        return True

    def ended(self, elapsed_ns: int) -> bool:
        """The model has returned; False where the step did not do what it should."""
        entry, step, record, state = self.entry, self.step, self.step.record, self._state
        slots = step.past + 1
        if (
            entry.run is not self
            or self._calls != len(self.layers)
            or record.fault is not None
            or (self.growth and record.events)
            or step.cache.get_seq_length() != slots
            or (self._checks and self.growth and growth_of(step) != self.growth)
        ):
            return False
        if not self.growth:
            self.events.append(record.events + sizes_after(step, step.cache))
            record.events = []
        token = record.token_ids[0] if record.token_ids else 0
        entry.slots, state.last_token = slots, token
        entry.steps += 1
        state.tokens += 1
        if self.devices:
            self.ran, self.is_running = self._held.ran(self), False
        self.started.append(record.started_ns)
        self.tokens.append(token)
        self.durations.append(max(0, elapsed_ns - step.tap_ns))
        # Else it would keep its cache alive; last, since a run without one gets no more steps.
        step.cache = None
        return True

    def take(self, dtype: torch.dtype) -> tuple[DecodeSteps, RunRows]:
        """The steps that are not sent yet, and their rows in their storage type.

        Any thread, one at a time; the running step goes on meanwhile.
        """
        steps = len(self.durations)
        message = DecodeSteps(
            self.model.info.key,
            self._state.request,
            self._state.prompt_tokens,
            self._position,
            self.started[:steps],
            self.durations[:steps],
            self.tokens[:steps],
            self._slot + 1,
            self.growth,
            self.events[:steps],
        )
        layers = [layer.rows(steps) for layer in self.layers]
        rows = RunRows([one for one in layers if one is not None], self._slot, steps, dtype)
        for column in (self.started, self.tokens, self.events, self.durations):
            del column[:steps]
        self._position += steps
        self._slot += steps
        return message, rows

    def hand_over(self) -> None:
        """The running step goes on the general way."""
        step, entry = self.step, self.entry
        self.end()
        entry.real = np.concatenate((entry.real, _ONE), axis=1)
        step.run = None
        for layer in self.layers[: self._calls]:
            if (taken := layer.of_step(step.past)) is not None:
                step.taken[taken.spec.layer] = taken

    def end(self) -> None:
        """Send what is held; further steps of the cache begin the general way."""
        entry = self.entry
        self._held.end_run(self)
        if entry.run is not self:
            return
        entry.run = None
        missing = entry.slots - entry.real.shape[1]
        entry.real = np.concatenate((entry.real, np.ones((1, missing), bool)), axis=1)
        for one in self.growth:
            entry.sizes[one.layer] = (entry.slots, entry.slots * one.nbytes)


def begin_run(step: ActiveStep, held: HeldSteps, *, has_rows: bool) -> None:
    """Let what comes after a step be a run, where the step was plain.

    Parameters
    ----------
    step : ActiveStep
        A step that has ended.
    held : HeldSteps
        Holds steps until they are sent.
    has_rows : bool
        Whether layers' rows are recorded; else their calls do not matter.
    """
    layers = [layer for layer in step.calls if layer is not None] if has_rows else []
    recorded = sum(layer.taken is not None for layer in layers)
    if (
        step.length == step.batch == 1
        and step.past
        and step.record.phase == "decode"
        and step.record.fault is None
        and step.record.caveat is None
        and step.record.token_ids is not None
        and step.keep is None
        and step.half is None
        and step.cache is not None
        and not step.is_packed
        and len(layers) == (len(step.calls) if has_rows else 0)
        and recorded == len(step.taken)
        and (bool(recorded) or not has_rows)
    ):
        # Steps that wait to be sent hold the keys and values of before the run: no step of it
        # would let go of them.
        held.flush(step.entry)
        step.entry.run = DecodeRun(step, layers, held)


def _empty(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.new_empty(0)


def _shows(mask: Any, past: int) -> bool:
    """Whether a mask shows the step's token; as far as is plain to see."""
    if mask is None:
        return True
    if not isinstance(mask, torch.Tensor) or mask.shape != (1, past + 1):
        return False
    # torch's own indexing costs three times as much.
    return bool(mask.numpy()[0, past] == 1 if mask.device.type == "cpu" else mask[0, past] == 1)
