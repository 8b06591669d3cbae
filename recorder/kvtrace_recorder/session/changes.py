"""What a change of a cache between two steps means for the requests that live in it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvtrace_recorder.messages import CacheChange, CacheEvent, Message
from kvtrace_recorder.session.cache_sizes import cache_events, layer_size
from kvtrace_recorder.session.held import HeldSteps
from kvtrace_recorder.session.requests import CacheEntry, RequestBook
from kvtrace_recorder.session.step import ActiveStep
from kvtrace_recorder.taps.guard import UnrecordableError


class CacheChanges:
    """Follows what changes a cache other than a step's own tokens.

    Parameters
    ----------
    book : RequestBook
        Knows the caches and the requests in them.
    held : HeldSteps
        Holds rows that are still in them.
    put : callable
        Takes what is to be written.
    """

    def __init__(self, book: RequestBook, held: HeldSteps, put: Callable[[Message], None]) -> None:
        self._book = book
        self._held = held
        self._put = put

    def before(self, cache: Any) -> None:
        """A cache is about to be changed: what is held of it is copied first."""
        entry = self._book.find(cache)
        if entry is not None:
            entry.settle()
            self._held.flush(entry)
            self._held.settle()

    def after(self, cache: Any, method: str, event: str, value: Any) -> None:
        """Slots of a cache were dropped or moved."""
        entry = self._book.find(cache)
        if entry is None:
            return
        try:
            if entry.lost is None:
                apply_change(self._book, entry, cache, method, value)
        except UnrecordableError as error:
            entry.lost = str(error)
        if events := cache_events(cache, entry, event):
            self._put(CacheChange(tuple(events)))

    def layer_moved(self, layer: Any, event: str, step: ActiveStep | None) -> None:
        """A layer of a cache lies on another device now, in `step` where one runs."""
        cache = self._book.cache_with(layer)
        if cache is None:
            return
        number = next(n for n, own in enumerate(cache.layers) if own is layer)
        slots, nbytes = layer_size(layer)
        device = str(layer.keys.device)
        moved = CacheEvent(time.time_ns(), number, event, slots, nbytes, device)
        if step is not None:
            step.record.events.append(moved)
        else:
            self._put(CacheChange((moved,)))


def apply_change(book: RequestBook, entry: CacheEntry, cache: Any, method: str, value: Any) -> None:
    """Follow a call of one of the methods of `Cache` that change what its slots hold.

    Parameters
    ----------
    book : RequestBook
        Owns the requests.
    entry : CacheEntry
        The cache's; changed.
    cache : transformers Cache
        As the call has left it.
    method : str
        Name of the method.
    value : object
        Its argument.

    Raises
    ------
    UnrecordableError
        Where the requests cannot be followed.
    """
    if method == "crop":
        slots = int(cache.get_seq_length())
        if slots > entry.slots:
            raise UnrecordableError(f"a crop left {slots} tokens of {entry.slots}")
        entry.crop(slots)
        return
    batch = len(entry.requests)
    if method == "batch_repeat_interleave":
        indices = np.repeat(np.arange(batch), int(value))
    else:
        indices = _chosen_rows(value, batch)
    if not np.array_equal(indices, np.arange(batch)):
        book.select(entry, indices)


def _chosen_rows(value: Any, batch: int) -> NDArray[np.int64]:
    """Batch rows that an index of any kind picks."""
    index = value.cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    try:
        return np.asarray(np.arange(batch)[index])
    except IndexError as error:
        raise UnrecordableError(f"rows of a batch of {batch} were chosen: {error}") from error
