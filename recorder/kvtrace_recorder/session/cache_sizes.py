"""How large each layer of a cache is, and how that changed over a step."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers.cache_utils import BaseQuantizedLayer, Cache, DynamicLayer

from kvtrace_recorder.messages import CacheEvent, LayerGrowth
from kvtrace_recorder.session.requests import CacheEntry
from kvtrace_recorder.session.step import ActiveStep


def find_cache(output: Any) -> Cache | None:
    """The cache that a model made for itself, from what it returned."""
    found = getattr(output, "past_key_values", None)
    found = getattr(found, "self_attention_cache", found)
    if found is None and isinstance(output, tuple):
        found = next((part for part in output if isinstance(part, Cache)), None)
    return found if isinstance(found, Cache) else None


def sizes_after(step: ActiveStep, cache: Cache) -> list[CacheEvent]:
    """What a step did to the memory of its caches."""
    step.entry.numbers = step.model.cached
    found = cache_events(cache, step.entry)
    if step.cross_cache is not None:
        found += cache_events(step.cross_cache, step.entry, numbers=step.model.cross_cached)
    return found


def cache_events(
    cache: Any,
    entry: CacheEntry,
    change: str | None = None,
    numbers: Mapping[int, int] | None = None,
) -> list[CacheEvent]:
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
    numbers : mapping of int to int, optional
        Layer numbers by index in the cache; the entry's own where left out.
    """
    numbers = entry.numbers if numbers is None else numbers
    found = []
    now = time.time_ns()
    for index, layer in enumerate(cache.layers):
        number = numbers.get(index, index)
        keys = getattr(layer, "keys", None)
        if not isinstance(keys, torch.Tensor):
            continue
        before = entry.sizes.get(number, (0, 0))
        size: tuple[int, int]
        if before[0] and change is None and type(layer) is DynamicLayer:
            # A decode step's: made anew by every update, exactly as large as what it holds.
            slots = keys.shape[-2]
            size = before if slots == before[0] else (slots, keys.nbytes + layer.values.nbytes)
        else:
            size = layer_size(layer)
        if size != before or change == "reorder":
            event = change or ("grow" if size >= before else "crop")
            found.append(CacheEvent(now, number, event, *size, _device_name(keys.device)))
            entry.sizes[number] = size
    return found


def growth_of(step: ActiveStep) -> tuple[LayerGrowth, ...]:
    """What a token more takes in each layer of a step's cache; empty where that is not the same.

    Only of a cache whose layers all hold their tokens and nothing else, as many as the step left.
    """
    slots, found = step.past + step.length, []
    for index, layer in enumerate(step.cache.layers):
        if type(layer) is not DynamicLayer or layer.keys.shape[-2] != slots:
            return ()
        nbytes = (layer.keys.nbytes + layer.values.nbytes) // slots
        number = step.entry.numbers.get(index, index)
        found.append(LayerGrowth(number, nbytes, _device_name(layer.keys.device)))
    return tuple(found)


def layer_size(layer: Any) -> tuple[int, int]:
    """Slots and bytes that a layer of a cache holds, the latter over the whole batch.

    A sliding layer holds its window, a static one all that it has room for, a quantised one its
    packed keys and values with their scales, and those that it has not packed yet.
    """
    if isinstance(layer, BaseQuantizedLayer):
        slots = layer.get_seq_length()
    else:
        slots = layer.keys.shape[-2] if layer.keys.ndim > 1 else 0
    names = ("keys", "values", "_quantized_keys", "_quantized_values")
    storages: dict[int, int] = {}
    for tensor in _tensors([getattr(layer, name, None) for name in names]):
        # The memory behind it: a cropped cache is a view of all it was.
        memory = tensor.untyped_storage()
        storages[memory.data_ptr()] = memory.nbytes()
    return int(slots), sum(storages.values())


@functools.cache
def _device_name(device: torch.device) -> str:
    return str(device)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Plain tensors inside lists, mappings, and tensors that are made of others."""
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        value = [getattr(value, name) for name in names]
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)
