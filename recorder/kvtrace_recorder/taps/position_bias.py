"""Learned position biases, as T5's: a number a head and distance, added to the scores."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvtrace.writer import LayerSpec
from kvtrace_recorder.session.models import ModelState
from kvtrace_recorder.session.step import ActiveStep
from kvtrace_recorder.taps.call import Call
from kvtrace_recorder.taps.guard import UnrecordableError
from kvtrace_recorder.taps.keep import q_heads
from kvtrace_recorder.taps.masks import is_check_due

#: [q_head][distance], as in column `position_bias` of table `layers`.
Table = tuple[tuple[float, ...], ...]


def bias_table(model: ModelState, layer: int, call: Call) -> Table | None:
    """What a layer adds to its scores by distance; None where that is nothing.

    Raises
    ------
    UnrecordableError
        Where the call is given a bias and no module of the model explains it.
    """
    bias = call.extra.get("position_bias")
    if bias is None or not bool(bias.any()):
        return None
    source = model.bias_source(call.module)
    if source is None:
        raise UnrecordableError(f"layer {layer} adds a position bias of unknown form to its scores")
    reach = int(source.relative_attention_max_distance)
    weight: Any = source.relative_attention_bias.weight.detach()
    # By the weight and not by calling the module, on which a user may have hooks.
    distances = torch.arange(-reach, reach + 1, device=weight.device)
    numbers: Any = weight[_buckets(source, distances)].float()
    return tuple(tuple(row) for row in numbers.T.cpu().tolist())


def _buckets(source: Any, distances: torch.Tensor) -> Any:
    """Which row of the weight stands for each distance."""
    find = source._relative_position_bucket
    if "bidirectional" not in inspect.signature(find).parameters:
        # UMT5 asks the module itself.
        return find(distances)
    return find(
        distances,
        bidirectional=not source.is_decoder,
        num_buckets=source.relative_attention_num_buckets,
        max_distance=source.relative_attention_max_distance,
    )


def check_bias(step: ActiveStep, call: Call, spec: LayerSpec) -> None:
    """Compare a row of a call's bias with the layer's table.

    Raises
    ------
    UnrecordableError
        Where the call adds something else.
    """
    bias = call.extra.get("position_bias")
    if bias is None and spec.position_bias is None:
        return
    if not is_check_due(step):
        return
    group = spec.num_q_heads // spec.num_kv_heads
    last, total = step.past + step.length - 1, step.past + step.length
    count = call.k.shape[2] if spec.attention_kind == "cross" else min(total, call.k.shape[2])
    found: NDArray[np.float32] = np.zeros((spec.num_q_heads, count), np.float32)
    if bias is not None:
        row = bias[0, :, -1, :count].detach().float().cpu().numpy()
        has_all = spec.kv_heads is None or len(row) == spec.num_q_heads
        found += row if has_all else row[q_heads(spec.kv_heads or (), group)]
    expected = np.zeros_like(found)
    if spec.position_bias is not None:
        table = np.array(spec.position_bias, np.float32)
        reach = table.shape[1] // 2
        expected = table[:, np.clip(np.arange(count) - last, -reach, reach) + reach]
    if not np.array_equal(found, expected):
        raise UnrecordableError(f"layer {spec.layer} adds another position bias than it learned")
