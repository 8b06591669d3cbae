"""What a change of a cache between two steps means for the requests that live in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvtrace_recorder.session.requests import CacheEntry, RequestBook
from kvtrace_recorder.taps.guard import UnrecordableError


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
