"""What ran through an encoder, until a decoder has read it.

The keys and values of cross attention are made in the decoder's first step, and stand on the
encoder's rows: so those rows wait for that step.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvtrace_recorder.messages import CacheChange, Dormant, Ended
from kvtrace_recorder.session.held import HeldSteps
from kvtrace_recorder.session.models import ModelState
from kvtrace_recorder.session.requests import CacheEntry
from kvtrace_recorder.session.step import ActiveStep, Taken

#: Runs of encoders that a decoder may still read.
RECENT = 4
NOT_SEEN = "the decoder read an encoder's output that was not recorded"


@dataclass(eq=False)
class EncoderRun:
    """One forward pass of an encoder.

    Attributes
    ----------
    model : int
        The session's number of the model.
    requests : tuple of int
        By batch row.
    real : numpy.ndarray
        [batch, token] of bool: tokens rather than padding.
    signature : numpy.ndarray
        [batch, 2 * hidden], the output at the first and the last token, by which a decoder's
        input is known again, also after its rows were repeated for the beams.
    thread : int
        That ran it.
    step : ActiveStep or None
        As long as its rows wait.
    keys : list of Taken
        Keys and values that a decoder's cross attention has made of them, by layer.
    lost : str or None
        Why they are not in the trace.
    """

    model: int
    requests: tuple[int, ...]
    real: NDArray[np.bool_]
    signature: NDArray[np.float32]
    thread: int
    step: ActiveStep | None
    keys: list[Taken] = field(default_factory=list)
    lost: str | None = None

    def rows_of(self, hidden: torch.Tensor) -> list[int] | None:
        """Which row of this run each row of a decoder's input is; None where one is none."""
        if tuple(hidden.shape[1:2]) != self.real.shape[1:]:
            return None
        given = sign(hidden)
        if given.shape[1] != self.signature.shape[1]:
            return None
        found = []
        for at, row in enumerate(given):
            same = np.flatnonzero((self.signature == row).all(axis=1))
            if not len(same):
                return None
            # Equal texts have equal outputs: then rows are taken in order.
            likely = at * len(self.signature) // len(given)
            found.append(likely if likely in same else int(same[0]))
        return found


class Encoders:
    """The last runs of encoders, and their rows until a decoder has read them.

    Parameters
    ----------
    ended : collections.deque
        Takes what is to be said of requests that no decoder can read any more.
    held : HeldSteps
        Copies rows.
    submit : callable
        Takes a step that waits no more.
    """

    def __init__(
        self,
        ended: deque[CacheChange | Dormant | Ended],
        held: HeldSteps,
        submit: Callable[[ActiveStep], None],
    ) -> None:
        self._ended = ended
        self._held = held
        self._submit = submit
        self._recent: deque[EncoderRun] = deque()
        self._lock = threading.RLock()

    def ran(self, step: ActiveStep, output: Any) -> None:
        """An encoder has returned: its rows wait for the decoder that reads them."""
        hidden = output[0]
        if step.record.fault or not step.batch or not isinstance(hidden, torch.Tensor):
            self._submit(step)
            return
        for run in self._add(step, hidden):
            self.release(run, read=False)

    def find(self, model: ModelState, entry: CacheEntry, states: Any) -> None:
        """Learn which run of an encoder the requests of a decoder read."""
        found = self._find(model.info.key, states)
        if found is None:
            entry.lost = NOT_SEEN
            return
        entry.encoder, rows = found
        entry.lost = entry.encoder.lost
        for state, row in zip(entry.requests, rows, strict=True):
            state.encoder = entry.encoder.requests[row]

    def release(self, run: EncoderRun | None, *, read: bool) -> None:
        """Send the rows of a run that wait, with the keys that a decoder made of them.

        Parameters
        ----------
        run : EncoderRun or None
            The run; nothing is done where there is none, or where its rows were sent.
        read : bool
            Whether a decoder has read it.
        """
        if run is None:
            return
        with self._lock:
            # A thread that has more runs than `RECENT` sends others' rows, too.
            step, run.step = run.step, None
        if step is None:
            return
        if run.thread != threading.get_ident():
            self._held.synchronize()
        for taken in run.keys if read else ():
            if step.is_large and step.record.fault is None:
                self._held.copy_now(step, taken)
            else:
                step.taken[taken.spec.layer] = taken
        run.keys = []
        self._submit(step)
        # The decoder's rows come after.
        self._held.flush(step.entry)
        run.lost = step.entry.lost

    def make_room(self) -> None:
        """Send the rows of this thread's runs that hold memory which the writer waits for.

        Nothing is read any more that could free it, and the thread may be about to wait for room.
        """
        with self._lock:
            holding = [
                run
                for run in self._recent
                if run.thread == threading.get_ident() and run.step is not None and run.step.slabs
            ]
        for run in holding:
            self.release(run, read=False)

    def close(self) -> None:
        """Send all that still waits."""
        with self._lock:
            found = list(self._recent)
            self._recent.clear()
        for run in found:
            self.release(run, read=False)

    def _add(self, step: ActiveStep, hidden: torch.Tensor) -> list[EncoderRun]:
        """Let the rows of a step wait for a decoder. Returns runs that have waited too long."""
        states = step.entry.requests
        numbers = tuple(state.request for state in states)
        model, thread = step.model.info.key, threading.get_ident()
        run = EncoderRun(model, numbers, step.real, sign(hidden), thread, step)
        # The requests end when no decoder can read them any more.
        weakref.finalize(run, self._ended.append, Ended(numbers, None)).atexit = False
        with self._lock:
            self._recent.append(run)
            return [self._recent.popleft() for _ in range(len(self._recent) - RECENT)]

    def _find(self, model: int, hidden: Any) -> tuple[EncoderRun, list[int]] | None:
        """The run that a decoder reads, and which of its rows each of the decoder's is."""
        if not isinstance(hidden, torch.Tensor) or hidden.ndim != 3:
            return None
        with self._lock:
            recent = [run for run in reversed(self._recent) if run.model == model]
        for run in recent:
            rows = run.rows_of(hidden)
            if rows is not None:
                return run, rows
        return None


def sign(hidden: torch.Tensor) -> NDArray[np.float32]:
    """[batch, 2 * hidden] of hidden states [batch, token, hidden]."""
    ends = hidden.detach()[:, [0, -1]].flatten(1).float()
    return np.asarray(ends.cpu().numpy())
