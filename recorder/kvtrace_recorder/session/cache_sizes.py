"""How large each layer of a cache is, and how that changed over a step."""

from __future__ import annotations

import time
from typing import Any

import torch

from kvtrace_recorder.messages import CacheEvent
from kvtrace_recorder.session.requests import CacheEntry


def cache_events(cache: Any, entry: CacheEntry, change: str | None = None) -> list[CacheEvent]:
    """Events for the layers whose memory changed since the last look; updates `entry.sizes`.

    Parameters
    ----------
    cache : transformers Cache
        The cache.
    entry : CacheEntry
        Knows the sizes as they were.
    change : str, optional
        What has just happened to the cache where that is known: a reordering is an event of every
        layer, whatever its size.
    """
    found = []
    now = time.time_ns()
    for number, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(keys, torch.Tensor) or not isinstance(values, torch.Tensor):
            continue
        size = (keys.shape[-2] if keys.ndim > 1 else 0, _held_bytes(keys, values))
        before = entry.sizes.get(number, (0, 0))
        if size != before or change == "reorder":
            event = change or ("grow" if size >= before else "crop")
            found.append(CacheEvent(now, number, event, *size, str(keys.device)))
            entry.sizes[number] = size
    return found


def _held_bytes(*tensors: torch.Tensor) -> int:
    """Bytes of the memory behind some tensors: a cropped cache is a view of all it was."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())
