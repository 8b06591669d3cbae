"""Steps that wait to be copied and sent together.

A decode step is so small that the calls to copy and send it would cost more than the copies: up
to `STEPS` of them are held, for no longer than a live reader would notice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch

from kvtrace_recorder.messages import StepBatch
from kvtrace_recorder.pipeline import Pipeline
from kvtrace_recorder.session.copies import LayerParts, RowChoice
from kvtrace_recorder.session.decode import DecodeRun
from kvtrace_recorder.session.off_device import Ran
from kvtrace_recorder.session.requests import CacheEntry
from kvtrace_recorder.session.sending import HeldParcel, RunParcel, Sender
from kvtrace_recorder.session.step import ActiveStep, Hold, Taken
from kvtrace_recorder.taps.guard import TapGuard

#: Steps of one batch, at most.
STEPS = 64
#: For how long steps are held while the model goes on, and while it does not.
HELD_NS, IDLE_NS = 250_000_000, 300_000_000


class Held:
    """Consecutive small steps of the requests of one cache."""

    def __init__(self, first: ActiveStep) -> None:
        self.steps: list[ActiveStep] = []
        self.layers: dict[int, LayerParts] = {}
        self._first = first
        #: Where the rows lie, other than the host, and what the last step left there.
        self.devices: set[torch.device] = set()
        self.ran: Ran | None = None
        #: Whether a next step runs whose keys and values are held in place of theirs.
        self.is_running = False

    def takes(self, step: ActiveStep) -> bool:
        """Whether the step's rows can stand in one copy with those held."""
        first = self._first
        return (
            len(self.steps) < STEPS
            and not step.record.forks
            and not (step.summed or first.summed)
            and step.keeps == first.keeps
            and step.model is first.model
            and step.cache is first.cache
            and step.batch == first.batch
            and (step.batch == 1 or step.length == first.length == 1)
        )

    def add(self, step: ActiveStep) -> None:
        """Add a step that `takes` accepted."""
        self.steps.append(step)
        if step.record.fault is not None:
            return
        for number, taken in step.taken.items():
            if taken is None:
                continue
            parts = self.layers.get(number)
            if parts is None:
                parts = LayerParts(taken.spec, taken.sinks, taken.kinds)
                self.layers[number] = parts
            parts.add(taken, step.length)
            if parts.steps == 1:
                self.devices |= parts.devices
        step.taken = dict.fromkeys(step.taken)

    @property
    def started_ns(self) -> int:
        """When its first step began."""
        return self._first.record.started_ns

    @property
    def rows(self) -> RowChoice:
        """Which rows are written."""
        whole = [step for step in self.steps if step.record.fault is None]
        return RowChoice.of(whole) if whole else RowChoice(0, None, 0, None)


class HeldSteps:
    """The steps held of all caches; any thread.

    Parameters
    ----------
    open_pipeline : callable
        Gives the pipeline that takes the batches.
    dtype : str
        Storage type.
    guard : TapGuard
        Takes errors of the copies.
    """

    def __init__(self, open_pipeline: Callable[[], Pipeline], dtype: str, guard: TapGuard) -> None:
        self._open_pipeline = open_pipeline
        self._sender = Sender(open_pipeline, dtype, guard)
        #: Whoever holds it finds no rows refused between asking for that and adding a step.
        self.lock = threading.RLock()
        self._held: dict[int, Held] = {}
        self._runs: dict[int, DecodeRun] = {}

    def make_way(self, step: ActiveStep) -> None:
        """Send what is held, where a step that has ended cannot be sent together with it."""
        key = _key(step)
        with self.lock:
            held = self._held.get(key)
            if held is not None and (step.is_large or not held.takes(step)):
                self._flush(key)

    def add(self, step: ActiveStep) -> None:
        """Hold a step that has ended, or send it; `make_way` was called."""
        key = _key(step)
        with self.lock:
            if step.is_large:
                batch = StepBatch(step.model.info.key, [step.record], step.layers)
                if not batch.num_rows:
                    batch.layers = []
                self._open_pipeline().put(batch, step.slabs)
                return
            held = self._held.get(key)
            if held is None:
                held = self._held[key] = Held(step)
            held.add(step)
            if held.devices:
                held.ran, held.is_running = self._sender.off_device.ran(held.devices), False
            now_ns = step.record.started_ns + step.record.duration_ns
            if len(held.steps) == STEPS or now_ns - held.started_ns > HELD_NS:
                self._flush(key)

    def ended(self, run: DecodeRun, now_ns: int) -> None:
        """A step of a run has ended; what the run holds is sent now and then.

        By the model's thread, as long as it comes by often enough: another one would take the
        interpreter from it.
        """
        if id(run.entry) not in self._runs:
            with self.lock:
                self._runs[id(run.entry)] = run
        # The ticking thread may have taken all of them since.
        started = run.started[:1]
        if len(run.durations) >= STEPS or (started and now_ns - started[0] > HELD_NS):
            self.flush(run.entry)

    def end_run(self, run: DecodeRun) -> None:
        """Send what a run holds; no step of it will come."""
        with self.lock:
            self.flush(run.entry)
            self._runs.pop(id(run.entry), None)

    def renew(self, step: ActiveStep, taken: Taken) -> None:
        """Let go of the keys and values that a layer had before a small step.

        Held until the step has ended, those of all layers would be the whole cache a second time.
        """
        if taken.hold is not Hold.KEPT:
            return
        with self.lock:
            held = self._held.get(id(step.entry))
            parts = None if held is None else held.layers.get(taken.spec.layer)
            if held is not None and parts is not None:
                parts.renew(taken)
                held.is_running = bool(held.devices)

    def copy_now(self, step: ActiveStep, taken: Taken) -> None:
        """Copy one layer's rows of a large step."""
        parts = LayerParts(taken.spec, taken.sinks, taken.kinds)
        parts.add(taken, step.length)
        step.taken[taken.spec.layer] = None
        # Rows of an encoder that wait for this step would wait forever, were it to wait for room.
        run = step.entry.encoder
        admitted = bool(step.slabs) or (run is not None and run.step is not None)
        layers = len(step.model.expected.get(step.half, ()))
        self._sender.copy_layer(step, parts, admitted=admitted, layers=layers)

    def give_up(self, step: ActiveStep) -> None:
        """The rows of a large step will not be sent."""
        self._open_pipeline().give_back(step.slabs)
        step.layers, step.slabs = [], []

    def flush(self, entry: CacheEntry) -> None:
        """Copy and send what is held of one cache's requests."""
        self._flush(id(entry))

    def _flush(self, key: int) -> None:
        with self.lock:
            held, run = self._held.get(key), self._runs.get(key)
            if _is_anothers(held) or _is_anothers(run):
                # That thread comes by when its step has ended.
                return
            if held is not None:
                del self._held[key]
                self._sender.send(HeldParcel(held, self._sender.dtype))
            if run is None:
                return
            # Asked before the steps are taken: while they wait for room the model goes on, and
            # may end with steps that nobody has taken.
            is_over = run.cache() is None
            if run.durations:
                self._sender.send(RunParcel(run, self._sender.dtype))
            if is_over:
                # It holds the newest keys and values that the cache had.
                del self._runs[key]

    def flush_all(self) -> None:
        """Copy and send everything."""
        with self.lock:
            for key in [*self._held, *self._runs]:
                self._flush(key)

    def close(self) -> None:
        """Copy and send everything; no step will come."""
        with self.lock:
            self._sender.interrupted()
            self.synchronize()
            running: list[Held | DecodeRun] = [*self._held.values(), *self._runs.values()]
            for one in running:
                one.is_running = False
            self.flush_all()

    def starts(self, run: DecodeRun) -> None:
        """A step of a run begins whose keys and values, of a device, are held in place of others'.

        Another thread knows nothing of how far that device is with them.
        """
        with self.lock:
            run.is_running = True

    def ran(self, run: DecodeRun) -> Ran:
        """Such a step has ended."""
        return self._sender.off_device.ran(run.devices)

    def settle(self) -> None:
        """What this thread lets a device write comes after what is read of it."""
        self._sender.off_device.settle()

    def synchronize(self) -> None:
        """Wait for all that devices were given: what another thread held may then be read."""
        self._sender.off_device.synchronize()

    def tick(self) -> None:
        """Copy and send what waits for a model that does not come; called from another thread."""
        with self.lock:
            before = time.time_ns() - IDLE_NS
            due = [key for key, held in self._held.items() if held.started_ns < before]
            for key, run in self._runs.items():
                started = run.started[:1]
                if (started and started[0] < before) or run.cache() is None:
                    due.append(key)
            for key in due:
                self._flush(key)


def _is_anothers(held: Held | DecodeRun | None) -> bool:
    """Whether keys and values of a step that another thread runs on a device are held."""
    if held is None or not held.is_running:
        return False
    return held.ran is not None and held.ran.thread != threading.get_ident()


def _key(step: ActiveStep) -> int:
    # Each step of continuous batching has requests, and so an entry, of its own.
    return id(step.model if step.is_packed else step.entry)
