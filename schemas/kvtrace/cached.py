"""Requests and layers with a KV cache that grows: what can be replayed, and what together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kvtrace.model import Layer
from kvtrace.ranks import NUMBERS_PER_RANK
from kvtrace.trace import Trace


def cached_requests(trace: Trace) -> list[int]:
    """Requests in order, but of encoder-decoders those of the decoder alone."""
    requests = trace.requests()
    paired = {one.model for one in requests if one.encoder_request is not None}
    return [
        one.request
        for one in requests
        if one.encoder_request is not None or one.model not in paired
    ]


def cached_layers(trace: Trace, requests: Sequence[int]) -> list[Layer]:
    """Layers of some requests that gain keys with every token: all but cross attention."""
    found = {
        (spec.model, spec.layer): spec
        for request in requests
        for spec in trace.layers_of(request)
        if not spec.is_cross
    }
    return [found[key] for key in sorted(found)]


def model_kinds(trace: Trace) -> dict[int, int]:
    """By model, the first one of the same name and layers: ranks of one program run one model."""
    names = {row["model"]: row["name"] for row in trace.table("models").to_pylist()}
    layers: dict[int, list[Layer]] = {model: [] for model in names}
    for spec in trace.layers:
        layers[spec.model].append(replace(spec, model=0, array_group=0, array_index=0))
    found: dict[str, int] = {}
    kinds = {}
    for model, specs in layers.items():
        rank = model // NUMBERS_PER_RANK
        # What ran other heads of a model is that model.
        first = model - (rank - trace.shards.get(rank, rank)) * NUMBERS_PER_RANK
        kinds[model] = found.setdefault(repr((names[model], layers.get(first, specs))), first)
    return kinds


def not_together(trace: Trace, requests: Sequence[int]) -> str | None:
    """Why some requests cannot be replayed into one result; None where they can."""
    kinds = model_kinds(trace)
    models = {one.request: kinds[one.model] for one in trace.requests()}
    if len({models[request] for request in requests}) > 1:
        return "the requests are of several models"
    if not trace.table("forks").num_rows or not requests:
        return None
    rows = np.concatenate([trace.request_rows(request) for request in requests])
    if len(np.unique(rows)) < len(rows):
        return "some requests share rows, and a result says one eviction of each row"
    return None
