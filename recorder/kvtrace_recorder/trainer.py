"""Recording a training of transformers' Trainer: one callback, added to the user's own."""

from __future__ import annotations

import functools
import os
import weakref
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from kvtrace_recorder.session.recording import Recording, record
from kvtrace_recorder.taps.patch import Patch


class TraceCallback(TrainerCallback):  # type: ignore[misc]
    """Records every N-th step of a training into a trace.

    >>> trainer = Trainer(model=model, args=args, train_dataset=data,
    ...                   callbacks=[TraceCallback("train.kvtrace", every=100)])  # doctest: +SKIP

    The trace begins with the training and is closed at its end, also where the training raises or
    is interrupted (the trace is then "cut off"); for that `Trainer.train` is wrapped as long as a
    callback of this kind exists. Of several processes the first one records.

    Parameters
    ----------
    path : path-like
        The trace to make.
    every : int
        The steps whose number (the Trainer's `global_step`) it divides are recorded, each by its
        first batch; the number stands in `steps.training_step`.
    sequences : int
        So many sequences of the batch, from its first on, are kept.
    **options
        As of `kvtrace_recorder.record`: detail, dtype, force, strict and the others.

    Raises
    ------
    InputError
        When the training begins, for numbers below 1.
    TraceError
        When the training begins, where `path` exists or another recording runs.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        every: int = 100,
        sequences: int = 1,
        **options: Any,
    ) -> None:
        self.path = Path(path)
        self._every, self._sequences, self._options = every, sequences, options
        self._recording: Recording | None = None
        _watch_trainings_while(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the trace."""
        # A Trainer that looks for a batch size that fits begins anew.
        if self._recording is not None or not state.is_world_process_zero:
            return
        recording = record(kwargs["model"], self.path, **self._options)
        recording.sample(self._every, self._sequences)
        self._recording = recording.__enter__()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say how far the training is."""
        if self._recording is not None:
            self._recording.training_step = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the trace."""
        self.close()

    def close(self, error: BaseException | None = None) -> None:
        """Close the trace; nothing where none is open.

        Parameters
        ----------
        error : BaseException, optional
            What ended the training before its end.
        """
        recording, self._recording = self._recording, None
        if recording is not None:
            recording.__exit__(None if error is None else type(error), error, None)


def _closing(train: Any) -> Any:
    """`Trainer.train`, which tells its callbacks of its end, and not of what ended it early."""

    @functools.wraps(train)
    def closing(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return train(self, *args, **kwargs)
        except BaseException as error:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, TraceCallback):
                    callback.close(error)
            raise

    return closing


_patch = Patch(Trainer, "train", _closing)
_living = 0


def _watch_trainings_while(callback: TraceCallback) -> None:
    global _living
    if not _living:
        _patch.apply()
    _living += 1
    weakref.finalize(callback, _gone).atexit = False


def _gone() -> None:
    global _living
    _living -= 1
    if not _living:
        _patch.restore()
