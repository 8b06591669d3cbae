"""Which forward passes train a model, how far the training is, and which of them are recorded."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from kvtrace.errors import InputError
from kvtrace_recorder.messages import Gap


class Training:
    """The training side of a recording; made before torch is imported.

    A pass is training where its model is in training mode and gradients are on: a model that
    generates without `eval()`, or is evaluated, does not train.
    """

    def __init__(self) -> None:
        #: Training passes are sampled, one in so many; None: everything is recorded.
        self.every: int | None = None
        self._sequences: int | None = None
        self._told: int | None = None
        self._taken_at: int | None = None
        self._passes = 0
        self._skipped = 0
        self._optimizer_steps: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._local = threading.local()

    def sample(self, every: int, sequences: int) -> None:
        """Record every N-th training pass, some sequences of its batch, and nothing else.

        Raises
        ------
        InputError
            For numbers below 1.
        """
        for name, number in (("every", every), ("sequences", sequences)):
            if number < 1:
                raise InputError(f"{name}={number} was given; a number from 1 on was expected")
        self.every, self._sequences = every, sequences

    @property
    def step(self) -> int:
        """Optimizer steps taken before: as told, else as counted of the busiest optimizer."""
        if self._told is not None:
            return self._told
        return max(self._optimizer_steps.values(), default=0)

    @step.setter
    def step(self, number: int) -> None:
        self._told = number

    def stepped(self, optimizer: Any) -> None:
        """An optimizer has changed the weights."""
        self._optimizer_steps[optimizer] = self._optimizer_steps.get(optimizer, 0) + 1

    def begin_pass(self, module: Any) -> None:
        """An outermost forward pass begins in this thread."""
        import torch

        trains = module.training and torch.is_grad_enabled()
        self._local.trains = trains
        self._local.taken = self.every is None or (trains and self._is_due(self.every))

    @property
    def is_taken(self) -> bool:
        """Whether the pass that runs in this thread is recorded."""
        return getattr(self._local, "taken", True)

    @property
    def trains(self) -> bool:
        """Whether the pass that runs in this thread is training."""
        return getattr(self._local, "trains", False)

    @property
    def sequences(self) -> int | None:
        """Sequences that are kept of a training batch; None: all."""
        return self._sequences

    def skipped(self) -> Gap | None:
        """Training passes not recorded since this was last asked."""
        count, self._skipped = self._skipped, 0
        if not count:
            return None
        return Gap("training passes", count, f"sampled: one in {self.every} is recorded")

    def _is_due(self, every: int) -> bool:
        if self._told is not None:
            # With accumulated gradients the first pass of the step.
            due = self._told % every == 0 and self._told != self._taken_at
            self._taken_at = self._told if due else self._taken_at
        else:
            due = self._passes % every == 0
        self._passes += 1
        self._skipped += not due
        return due
