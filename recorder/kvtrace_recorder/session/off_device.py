"""Rows of a GPU (or another accelerator) on their way to the host: nothing of the model waits.

A side stream waits for what the model's stream has been given so far, gathers the rows into memory
of its own, and copies them into pinned memory of the host. The thread that sends waits for that,
and puts them into their slab. Where memory cannot be pinned the rows are copied at once, as those
of a CPU are, and the model waits for them.

Three things keep the rows what they were. The allocator is told that the side stream reads what the
model lets go of (`record_stream`). What may write into a tensor of the model in place, such as a
static cache that begins anew, waits for the gathering (`settle`): on the device, where it is short.
And another thread than the model's reads only what a step that has ended left, once its event says
so: it knows nothing of the model's streams, and asks nothing of them, since one may be capturing a
CUDA graph.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from kvtrace_recorder.taps.keep import is_off_host
from kvtrace_recorder.writer.slabs import Slab

#: Bytes of rows that may be under way from the devices, and keep memory of theirs from being used
#: again; a single larger copy is let through alone.
UNDER_WAY_BYTES = 256 << 20


class TorchCalls:
    """What is asked of torch, in its words for any accelerator."""

    def current_stream(self, device: torch.device) -> Any:
        """The stream that this thread gives its work to."""
        return torch.accelerator.current_stream(device)

    def side_stream(self, device: torch.device) -> Any:
        """A stream of our own."""
        return torch.Stream(device=device)

    def event(self, device: torch.device) -> Any:
        """An event that a thread can wait for without using a core."""
        return torch.Event(device=device, blocking=True)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the host that a device can write into by itself."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def gather(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The values in one piece on their device, by its current stream."""
        found = torch.empty(values.shape, dtype=dtype, device=values.device)
        return found.copy_(values)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy to the host, by the current stream of the source's device."""
        target.copy_(source, non_blocking=True)

    def record(self, event: Any, stream: Any) -> None:
        """Let an event stand for what a stream has been given so far."""
        event.record(stream)

    def keep_for(self, values: torch.Tensor, stream: Any) -> None:
        """Do not use a tensor's memory again before what a stream has been given so far is done."""
        values.record_stream(stream)

    def synchronize(self, device: torch.device) -> None:
        """Wait for everything."""
        torch.accelerator.synchronize(device)


def is_capturing() -> bool:
    """Whether this thread is making a CUDA graph: then nothing of it may be read."""
    is_initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return is_initialized and torch.cuda.is_current_stream_capturing()


@dataclass(frozen=True)
class Ran:
    """What a step that has ended left on its devices.

    Attributes
    ----------
    thread : int
        The model's.
    events : dict of torch.device to event
        Each says that the step's work on that device is done.
    """

    thread: int
    events: dict[torch.device, Any]


@dataclass
class Arrival:
    """Rows under way into one slab.

    Attributes
    ----------
    calls : TorchCalls
        As in `OffDevice`.
    gathered : list of (target, values)
        In a slab, and on a device.
    staged : list of (target, values)
        In a slab, and in pinned memory.
    events : list of event
        Say that `staged` has its values.
    """

    calls: TorchCalls
    gathered: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    staged: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    events: list[Any] = field(default_factory=list)

    def add(self, target: torch.Tensor, values: torch.Tensor) -> None:
        """Let some values arrive in a piece of the slab."""
        if is_off_host(values):
            self.gathered.append((target, self.calls.gather(values, target.dtype)))
        else:
            target.copy_(values)

    def finish(self) -> None:
        """Wait until all is there, and put it into the slab; the sending thread."""
        for event in self.events:
            event.synchronize()
        for target, values in self.staged:
            target.copy_(values)
        self.events, self.staged = [], []


class OffDevice:
    """Copies rows from devices to slabs; any thread."""

    def __init__(self) -> None:
        self._calls = TorchCalls()
        self._lock = threading.RLock()
        self._sides: dict[torch.device, Any] = {}
        #: By device: the last gathering.
        self._gathered: dict[torch.device, Any] = {}
        self._under_way: deque[tuple[Any, int]] = deque()
        #: Whether copies go the synchronous way.
        self._is_synchronous = False

    def ran(self, devices: Iterable[torch.device]) -> Ran:
        """A step has ended in this thread, of which rows on these devices are held."""
        events = {}
        for device in devices:
            events[device] = self._calls.event(device)
            self._calls.record(events[device], self._calls.current_stream(device))
        return Ran(threading.get_ident(), events)

    def settle(self) -> None:
        """What this thread gives its streams from here on comes after what was gathered so far."""
        for device, event in list(self._gathered.items()):
            self._calls.current_stream(device).wait_event(event)

    def synchronize(self) -> None:
        """Wait for everything that the devices have been given."""
        for device in list(self._sides):
            self._calls.synchronize(device)

    @contextmanager
    def gathering(
        self, slab: Slab, tensors: Sequence[torch.Tensor], ran: Ran | None
    ) -> Iterator[None]:
        """While rows of some tensors are copied into a slab.

        Parameters
        ----------
        slab : Slab
            Takes them; nothing of it may be read before its `arrival` has finished.
        tensors : sequence of torch.Tensor
            All that is read, of any device.
        ran : Ran or None
            The last step that wrote into them, where that was in another thread or may have been.
        """
        own = ran is None or ran.thread == threading.get_ident()
        devices = {tensor.device for tensor in tensors if is_off_host(tensor)}
        if not self._has_sides(devices):
            for device in () if own else devices:
                self._calls.synchronize(device)
            yield
            return
        arrival = slab.arrival = Arrival(self._calls)
        with self._lock, ExitStack() as streams:
            for device in devices:
                side = self._sides[device]
                if own:
                    side.wait_stream(self._calls.current_stream(device))
                elif ran is not None and device in ran.events:
                    side.wait_event(ran.events[device])
                streams.enter_context(side)
            yield
            for tensor in tensors:
                if is_off_host(tensor):
                    self._calls.keep_for(tensor, self._sides[tensor.device])
            for device in devices:
                event = self._gathered[device] = self._calls.event(device)
                self._calls.record(event, self._sides[device])
            self._send_off(arrival, devices, slab.used)

    def _send_off(self, arrival: Arrival, devices: set[torch.device], nbytes: int) -> None:
        gathered, arrival.gathered = arrival.gathered, []
        for target, values in gathered:
            try:
                staged = self._calls.pinned(values.shape, values.dtype)
            except RuntimeError as error:
                self._say(error)
                target.copy_(values)
                continue
            self._calls.copy(staged, values)
            arrival.staged.append((target, staged))
        for device in devices:
            event = self._calls.event(device)
            self._calls.record(event, self._sides[device])
            arrival.events.append(event)
            self._limit(event, nbytes)

    def _limit(self, event: Any, nbytes: int) -> None:
        """Wait for the oldest copies where too much is under way."""
        self._under_way.append((event, nbytes))
        while len(self._under_way) > 1:
            oldest, _ = self._under_way[0]
            if sum(size for _, size in self._under_way) > UNDER_WAY_BYTES:
                oldest.synchronize()
            elif not oldest.query():
                return
            self._under_way.popleft()

    def _has_sides(self, devices: Iterable[torch.device]) -> bool:
        """Whether copies from these devices can go the asynchronous way."""
        if self._is_synchronous:
            return False
        try:
            with self._lock:
                for device in devices:
                    if device not in self._sides:
                        self._calls.pinned((1,), torch.uint8)
                        self._sides[device] = self._calls.side_stream(device)
        except (RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
            self._say(error)
        return not self._is_synchronous

    def _say(self, error: Exception) -> None:
        """Go the synchronous way from here on, and say so."""
        if not self._is_synchronous:
            self._is_synchronous = True
            print(
                "kvtrace: rows are copied from the device while the model waits: no memory could"
                f" be pinned for them: {error}",
                file=sys.stderr,
            )
