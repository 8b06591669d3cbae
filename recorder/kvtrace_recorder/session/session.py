"""The state of a recording while it runs: from the taps' calls to messages for the writer."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers.modeling_utils import PreTrainedModel

from kvtrace.errors import KvtraceError
from kvtrace_recorder.messages import Gap, Message, StepRecord
from kvtrace_recorder.pipeline import Pipeline
from kvtrace_recorder.selection import Selection
from kvtrace_recorder.session.cache_sizes import find_cache, sizes_after
from kvtrace_recorder.session.changes import CacheChanges
from kvtrace_recorder.session.continuous import ContinuousBatches, is_paged
from kvtrace_recorder.session.decode import RunLayer, begin_run
from kvtrace_recorder.session.encoders import Encoders
from kvtrace_recorder.session.found import FoundModels
from kvtrace_recorder.session.halves import ENCODER, Halves
from kvtrace_recorder.session.held import HeldSteps
from kvtrace_recorder.session.inputs import StepInputs, read_inputs
from kvtrace_recorder.session.keeping import Keeper
from kvtrace_recorder.session.models import ModelState, has_transformers
from kvtrace_recorder.session.off_device import is_capturing
from kvtrace_recorder.session.plain import begin_unshaped, shape_step
from kvtrace_recorder.session.requests import Bools, CacheEntry, RequestBook
from kvtrace_recorder.session.samples import OutputSamples
from kvtrace_recorder.session.sequences import fillers, sequenced
from kvtrace_recorder.session.step import ActiveStep, Taken
from kvtrace_recorder.session.training import Training
from kvtrace_recorder.taps.call import Call, parse_call
from kvtrace_recorder.taps.guard import TapGuard, UnrecordableError
from kvtrace_recorder.taps.masks import token_mask
from kvtrace_recorder.taps.operands import take_rows

CAPTURED = "a CUDA graph was made of the model: its replays run no Python, and so no tap"

#: Whether a model runs around a call, its step, and that where attention calls are wanted.
Around = tuple[bool, ActiveStep | None, ActiveStep | None]


class Local(threading.local):
    """What runs in one thread; attributes rather than methods, since taps ask at every call.

    Attributes
    ----------
    inside : bool
        Whether a model runs, recorded or not.
    step : ActiveStep or None
        The step that runs.
    attending : ActiveStep or None
        The same where its attention calls are wanted.
    prompts : list of int or None
        Tokens of the prompts that `generate` gives its model in chunks.
    """

    inside: bool = False
    step: ActiveStep | None = None
    attending: ActiveStep | None = None
    prompts: list[int] | None = None


class Session:
    """Shared by the taps of one recording.

    Parameters
    ----------
    model : torch.nn.Module or None
        Only this model and what it contains; None: any transformers model that runs.
    open_pipeline : callable
        Gives the pipeline that takes the steps: a process has none before it needs one.
    detail, dtype : str
        What is kept, and its storage type.
    selection : Selection
        And which of it.
    verify : bool
        Put attention outputs aside, to be compared with the trace.
    strict : bool
        Let the taps' errors through.
    training : Training
        Says which passes are recorded while a model is trained.
    finds_plain : bool
        Where no model is named: record those that are none of transformers', too. Such a model is
        whatever module a program calls outside all others, and in which something attends.
    """

    def __init__(
        self,
        model: Any,
        open_pipeline: Callable[[], Pipeline],
        *,
        detail: str,
        dtype: str,
        selection: Selection,
        verify: bool,
        strict: bool,
        training: Training,
        finds_plain: bool = False,
    ) -> None:
        self.training = training
        self.guard = TapGuard(strict=strict, report=self._report)
        self.pid = os.getpid()
        #: False once the recording ends: torch.compile may hold on to what stood there.
        self.is_running = True
        #: The model to record where it is none of transformers' and contains none.
        self.plain = None if model is None or has_transformers(model) else model
        self.found = FoundModels(self._put) if finds_plain else None
        self._wanted = None if model is None else {id(module) for module in model.modules()}
        self._open_pipeline = open_pipeline
        self.samples = OutputSamples(self._put) if verify else None
        self.keeper = Keeper(selection, detail=detail, dtype=dtype, note=self._put)
        self._held = HeldSteps(open_pipeline, dtype, self.guard)
        #: What runs in this thread.
        self.local = Local()
        self._models: weakref.WeakKeyDictionary[Any, ModelState] = weakref.WeakKeyDictionary()
        self._keys = itertools.count()
        self._book = RequestBook()
        self.halves = Halves()
        self._encoders = Encoders(self._book.ended, self._held, self._submit)
        self.changes = CacheChanges(self._book, self._held, self._put)
        for module in () if model is None else model.modules():
            self.halves.learn(module)
        self.batches = ContinuousBatches(open_pipeline, self._book)
        self._noted: set[str] = set()

    @property
    def _pipeline(self) -> Pipeline:
        return self._open_pipeline()

    @property
    def current(self) -> ActiveStep | None:
        """The step that runs in this thread."""
        return self.local.step

    @property
    def prompts(self) -> list[int] | None:
        """Tokens of the prompts that this thread's `generate` gives its model in chunks."""
        return self.local.prompts

    @prompts.setter
    def prompts(self, found: list[int] | None) -> None:
        self.local.prompts = found

    @property
    def is_inside_call(self) -> bool:
        """Whether a model runs in this thread, recorded or not."""
        return self.local.inside

    def begins_step(self, module: Any) -> bool:
        """Whether a call of this model is a step: no model runs around it, or it is a half."""
        if not self.is_inside_call:
            return self.wants(module)
        return self.current is None and self.halves.of(module) is not None and self.wants(module)

    @property
    def attending(self) -> ActiveStep | None:
        """The step that runs in this thread, where its attention calls are wanted."""
        return self.local.attending

    def enter_call(self, step: ActiveStep | None) -> Around:
        """A model runs in this thread from here on; None where it is not recorded."""
        local = self.local
        around = (local.inside, local.step, local.attending)
        local.inside, local.step = True, step
        # Where only events are kept, the first step says what the layers are.
        wanted = step is not None and (self.keeper.has_rows or step.half not in step.model.expected)
        local.attending = step if wanted else None
        return around

    def leave_call(self, around: Around) -> None:
        """The model has returned or raised; `around` is what `enter_call` gave."""
        self.local.inside, self.local.step, self.local.attending = around

    def wants(self, module: Any) -> bool:
        """Whether a call of this model begins a step."""
        if self.plain is not None:
            return module is self.plain
        if self.found is not None and not isinstance(module, PreTrainedModel):
            return self.found.may_attend(module)
        return self._wanted is None or id(module) in self._wanted

    def begin(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ActiveStep | None:
        """A model is about to run; None where it is none that can be recorded."""
        if is_capturing() and not is_paged(kwargs):
            self.note_once(CAPTURED)
            return None
        step = self._next_of_run(module, args, kwargs)
        if step is not None:
            return step
        self.settle()
        if not self.is_inside_call:
            self.training.begin_pass(module)
        if not self.training.is_taken:
            return None
        self._note_skipped()
        self._send_ended()
        half = self.halves.of(module)
        if half is None and self.halves.learn(module):
            # Its halves are steps.
            return None
        if half is not None and half.kind == ENCODER:
            self._encoders.make_room()
        model = self.model_state(module if half is None else half.model)
        if self.found is not None and not model.is_plain:
            self.found.give_up()
        if is_paged(kwargs):
            return self._begin_batch(model, kwargs)
        if model.is_plain:
            return begin_unshaped(self, model, args, kwargs)
        inputs = read_inputs(model, half, args, kwargs)
        if isinstance(inputs, str) and half is not None and half.kind == ENCODER:
            # Of sounds or pictures: how many tokens they become shows in the first attention.
            step = begin_unshaped(self, model, args, kwargs)
            step.half = half.kind
            return step
        if isinstance(inputs, str):
            self.note_once(inputs)
            return None
        entry = self._book.entry_for(inputs.cache, inputs.past, inputs.batch)
        try:
            real = token_mask(inputs.mask, inputs.past, inputs.batch, inputs.length)
        except UnrecordableError as error:
            entry.lost = entry.lost or str(error)
            real = np.ones((inputs.batch, inputs.length), bool)
        if inputs.is_decode and self.prompts is None:
            real &= ~fillers(model, entry, inputs)
        if inputs.encoder_states is not None and entry.encoder is None and entry.lost is None:
            self._encoders.find(model, entry, inputs.encoder_states)
        step = self.new_step(model, inputs, entry, real)
        step.half, step.cross_cache = None if half is None else half.kind, inputs.cross_cache
        return step

    def attention(self, step: ActiveStep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """An attention function of transformers' interface has run."""
        call = parse_call(args, kwargs)
        taken = self.attended(step, call)
        if step.length == step.batch == 1 and step.past:
            step.calls.append(RunLayer.of(step, call, taken) if len(args) == 5 else None)

    def attended(self, step: ActiveStep, call: Call) -> Taken | None:
        """An attention layer has run with these operands; gives what is kept of them."""
        if step.run is not None:
            step.run.hand_over()
        if step.record.fault is not None:
            return None
        try:
            if not step.batch:
                shape_step(self, step, call)
            taken = take_rows(step, call, self.keeper)
        except UnrecordableError as error:
            step.record.fault = str(error)
            return None
        if taken is not None and step.is_large:
            self._held.copy_now(step, taken)
        elif taken is not None:
            self._held.renew(step, taken)
        return taken

    def returned(self, step: ActiveStep, call: Call, output: Any) -> None:
        """An attention layer has returned this; put aside where it is to be verified."""
        if self.samples is not None and step.record.fault is None:
            self.guard.run("verify", self.samples.take, step, call, output)

    def end(self, step: ActiveStep, output: Any, elapsed_ns: int) -> None:
        """The model has returned."""
        if not self.is_running:
            return
        if (run := step.run) is not None:
            if run.ended(elapsed_ns):
                self._held.ended(run, step.record.started_ns + elapsed_ns)
                return
            run.hand_over()
        if self.found is not None and not self.found.attended(step):
            return
        record, entry = step.record, step.entry
        record.duration_ns = max(0, elapsed_ns - step.tap_ns)
        cache = step.cache if step.cache is not None else find_cache(output)
        if record.fault is None:
            record.fault = self._differing_layers(step)
        if step.is_packed:
            self._submit(step)
            return
        if step.half == ENCODER:
            self._encoders.ran(step, output)
            return
        if cache is not None:
            self._book.bind(cache, entry)
            record.events += self.guard.run("cache sizes", sizes_after, step, cache) or []
        self._encoders.release(entry.encoder, read=record.fault is None)
        if entry.encoder is not None:
            record.fault = record.fault or entry.encoder.lost
        self._submit(step)
        entry.slots = step.past + step.length
        entry.steps += 1
        begin_run(step, self._held, has_rows=self.keeper.has_rows)
        if cache is None:
            self._book.drop(entry)

    def abandon(self, step: ActiveStep) -> None:
        """The model has raised."""
        if not self.is_running:
            return
        if step.run is not None:
            step.run.hand_over()
        if self.found is not None and not self.found.attended(step):
            return
        step.record.fault = step.record.fault or "the forward pass raised"
        self._encoders.release(step.entry.encoder, read=False)
        self._submit(step)

    def flush_held(self) -> None:
        """Send the steps that wait to be copied with their like."""
        self._held.flush_all()

    def settle(self) -> None:
        """What this thread lets a device write from here on comes after what is read of it."""
        self._held.settle()

    def tick(self) -> None:
        """Send what has waited long enough; called now and then from another thread."""
        self.guard.run("waiting steps", self._held.tick)

    def stop(self) -> None:
        """Begin no step from here on, and leave out those that run in other threads."""
        self.is_running = False

    def finish(self) -> None:
        """Send what is left; the taps are gone."""
        self._note_skipped()
        self._encoders.close()
        self._held.close()
        self._book.close()
        self.batches.finish()
        self._send_ended()

    def new_entry(self, batch: int) -> CacheEntry:
        """Requests of a step that has no cache."""
        return self._book.entry_for(None, 0, batch)

    def new_step(
        self, model: ModelState, inputs: StepInputs, entry: CacheEntry, real: Bools
    ) -> ActiveStep:
        """A step over the tokens of `inputs`, of which `real` are no padding."""
        trains, num_tokens = self.training.trains, 0
        if trains:
            num_tokens, real = int(real.sum()), self._first_sequences(real)
        entry.real = np.concatenate([entry.real[:, : inputs.past], real], axis=1)
        whole = bool(real.all())
        counts = [inputs.length] * inputs.batch if whole else real.sum(axis=1).tolist()
        decodes = inputs.is_decode and self.prompts is None
        record = StepRecord(
            phase="train" if trains else "decode" if decodes else "prefill",
            batch_size=inputs.batch,
            num_tokens=num_tokens if trains else sum(counts),
            training_step=self.training.step if trains else None,
            started_ns=time.time_ns(),
            forks=entry.forks(),
            sequences=[
                sequenced(row, state, count, inputs, self.prompts)
                for row, (state, count) in enumerate(zip(entry.requests, counts, strict=False))
                if count or (state.fork and not state.is_known)
            ],
            token_ids=None if inputs.token_ids is None else inputs.token_ids[real].tolist(),
            fault=entry.lost or self._silent(),
        )
        keep = None if whole else torch.as_tensor(np.flatnonzero(real))
        return ActiveStep(
            model, record, inputs.batch, inputs.length, inputs.past, inputs.cache, entry, real, keep
        )

    def _next_of_run(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ActiveStep | None:
        cache = kwargs.get("past_key_values")
        entry = self._book.find(cache)
        run = None if entry is None else entry.run
        if (
            run is None
            or run.module is not module
            or self._book.ended
            or self.guard.silent
            # The last chunk of a prompt may be a single token, as a decode step is.
            or self.local.prompts is not None
            or self.training.every is not None
            or (module.training and torch.is_grad_enabled())
        ):
            return None
        given = dict(zip(run.model.parameters, args, strict=False)) | kwargs if args else kwargs
        return run.next(cache, given, self.keeper)

    def _first_sequences(self, real: Bools) -> Bools:
        """The tokens that are kept of a training batch."""
        kept = self.training.sequences
        if kept is None or kept >= len(real):
            return real
        reason = f"sampled: the first {kept} of a training batch are recorded"
        self._pipeline.put(Gap("sequences", len(real) - kept, reason))
        return np.asarray(real & (np.arange(len(real)) < kept)[:, None])

    def _note_skipped(self) -> None:
        if skipped := self.training.skipped():
            self._pipeline.put(skipped)

    def _begin_batch(self, model: ModelState, inputs: dict[str, Any]) -> ActiveStep | None:
        if self.batches.unseen is not None:
            self.note_once(self.batches.unseen)
            return None
        if "paged cache" in self.guard.silent:
            # What the batch holds and where its keys lie is not known any more.
            return None
        step = self.batches.begin(model, inputs, self.flush_held)
        if step is not None:
            step.record.fault = self.guard.silent.get("attention")
        return step

    def _submit(self, step: ActiveStep) -> None:
        record, entry = step.record, step.entry
        with self._held.lock:
            self._held.make_way(step)
            # Earlier steps may have been refused by now, when they were copied.
            record.fault = record.fault or entry.reason
            if record.fault is not None:
                entry.lose(record.fault)
                self._held.give_up(step)
            else:
                self._advance(step)
            self._held.add(step)

    def _advance(self, step: ActiveStep) -> None:
        record, entry = step.record, step.entry
        start = 0
        for state in entry.requests:
            state.fork = None
        for sequence in record.sequences:
            state = entry.requests[sequence.batch_index]
            state.is_known, state.prompt_tokens = True, sequence.prompt_tokens
            state.tokens += sequence.count
            start += sequence.count
            if sequence.count:
                state.last_token = None if record.token_ids is None else record.token_ids[start - 1]

    def _silent(self) -> str | None:
        # A change of the cache that went unseen would make rows wrong.
        return self.guard.silent.get("attention") or self.guard.silent.get("cache")

    def _differing_layers(self, step: ActiveStep) -> str | None:
        found, expected = step.taken.keys(), step.model.expected
        if not self.keeper.has_rows and step.half in expected:
            return None
        if step.half not in expected:
            silent = self.guard.silent.get("attention")
            if silent is not None:
                return silent
            expected[step.half] = frozenset(found)
            columns = step.model.info.columns
            # Of layers that the model lacks, nothing is missing: `model_state` has said so.
            if not found and self.keeper.unknown_layers(columns) is None:
                name = columns["architecture"]
                self.note_once(f"q, k and v of {name}: no attention call passed the tap")
        if found == expected[step.half]:
            return None
        differing = sorted(found ^ expected[step.half])
        return self.guard.silent.get("attention") or f"layers {differing} did not attend as before"

    def model_state(self, module: Any) -> ModelState:
        """What is known of a model."""
        found = self._models.get(module)
        if found is None:
            found = self._models[module] = ModelState(next(self._keys), module)
            wo = None if found.is_plain else self.keeper.output_projections(module)
            if self.found is None or not found.is_plain:
                self._pipeline.put(replace(found.info, wo=wo))
            problem = self.keeper.unknown_layers(found.info.columns)
            # The configuration of an encoder-decoder counts the layers of one half.
            if problem and not found.has_halves:
                self.note_once(problem)
        return found

    def _report(self, tap: str, reason: str) -> None:
        try:
            self._pipeline.put(Gap(f"{tap} tap", 1, reason))
        except (KvtraceError, OSError) as error:
            # What the tap met was that the trace cannot be made.
            print(f"kvtrace: not recorded: {error}", file=sys.stderr)

    def _put(self, message: Message) -> None:
        self._pipeline.put(message)

    def note_once(self, reason: str) -> None:
        """Note in the trace what it does not hold, once a recording."""
        if reason not in self._noted:
            self._noted.add(reason)
            self._pipeline.put(Gap("model calls", 1, reason))

    def _send_ended(self) -> None:
        ended = self._book.take_ended()
        if not ended:
            return
        # The last steps of a cache come before its end.
        self._held.flush_all()
        for message in ended:
            self._pipeline.put(message)
