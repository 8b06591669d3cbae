"""What ran through an encoder, until a decoder has read it.

The keys and values of cross attention are made in the decoder's first step, and stand on the
encoder's rows: so those rows wait for that step.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvtrace_recorder.messages import CacheChange, Dormant, Ended
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


class EncoderRuns:
    """The last runs of encoders."""

    def __init__(self, ended: deque[CacheChange | Dormant | Ended]) -> None:
        self._ended = ended
        self._recent: deque[EncoderRun] = deque()
        self._lock = threading.Lock()

    def add(self, step: ActiveStep, hidden: torch.Tensor) -> list[EncoderRun]:
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

    def holding_memory(self) -> list[EncoderRun]:
        """Runs of this thread whose rows hold memory that the writer waits for."""
        with self._lock:
            return [
                run
                for run in self._recent
                if run.thread == threading.get_ident() and run.step is not None and run.step.slabs
            ]

    def find(self, model: int, hidden: Any) -> tuple[EncoderRun, list[int]] | None:
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

    def close(self) -> list[EncoderRun]:
        """All that still wait."""
        with self._lock:
            found = list(self._recent)
            self._recent.clear()
        return found


def sign(hidden: torch.Tensor) -> NDArray[np.float32]:
    """[batch, 2 * hidden] of hidden states [batch, token, hidden]."""
    ends = hidden.detach()[:, [0, -1]].flatten(1).float()
    return np.asarray(ends.cpu().numpy())
