"""Which heads of a layer this process runs, where they are split over several."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from kvtrace.writer import LayerSpec


def place_heads(spec: LayerSpec, module: torch.nn.Module) -> LayerSpec:
    """A layer with the model's numbers of its heads, where this process runs only some of them.

    That it does is known by the model's configuration having as many times more heads; which ones,
    by the projections being distributed tensors that are split by their rows (transformers'
    `tp_plan`, torch's `ColwiseParallel`). Where they are not, how many there are is all that is
    said.

    Parameters
    ----------
    spec : LayerSpec
        The layer as its attention call shows it.
    module : torch.nn.Module
        The attention module.
    """
    times = _times(spec, module)
    if times == 1:
        return spec
    count, place = spec.num_kv_heads, _place(module, times)
    heads = None if place is None else tuple(range(place * count, (place + 1) * count))
    return replace(spec, model_kv_heads=times * count, kv_heads=heads)


def _times(spec: LayerSpec, module: torch.nn.Module) -> int:
    """How many times the layer's heads the model has."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 1
    total = getattr(getattr(module, "config", None), "num_attention_heads", None)
    if not isinstance(total, int) or total <= spec.num_q_heads or total % spec.num_q_heads:
        # Also where each layer has a number of its own.
        return 1
    times = total // spec.num_q_heads
    return times if torch.distributed.get_world_size() % times == 0 else 1


def _place(module: torch.nn.Module, times: int) -> int | None:
    """Which of so many parts of its projections this process has; None where nothing says it."""
    for parameter in module.parameters():
        mesh: Any = getattr(parameter, "device_mesh", None)
        if mesh is None or parameter.ndim < 2:
            continue
        names = mesh.mesh_dim_names or ("",) * mesh.ndim
        split = [
            dim
            for dim, placement in enumerate(parameter.placements)  # type: ignore[attr-defined]
            if placement.is_shard(0) and mesh.size(dim) == times
        ]
        # A mesh of data and tensor parallelism may have two of one size: by name, or the inner one.
        split.sort(key=lambda dim: (names[dim] == "tp", dim))
        if split:
            return int(mesh.get_local_rank(split[-1]))
    return None
