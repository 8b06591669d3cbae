"""How large each layer of a cache is, and how that changed over a step."""

from __future__ import annotations

import time
from typing import Any

import torch

from kvtrace_recorder.messages import CacheEvent
from kvtrace_recorder.session.requests import CacheEntry


def cache_events(cache: Any, entry: CacheEntry) -> list[CacheEvent]:
    """Events for the layers whose memory changed since the last step; updates `entry.sizes`."""
    found = []
    now = time.time_ns()
    for number, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(keys, torch.Tensor) or not isinstance(values, torch.Tensor):
            continue
        size = (keys.shape[-2] if keys.ndim > 1 else 0, keys.nbytes + values.nbytes)
        before = entry.sizes.get(number, (0, 0))
        if size != before:
            event = "grow" if size >= before else "crop"
            found.append(CacheEvent(now, number, event, *size, str(keys.device)))
            entry.sizes[number] = size
    return found
