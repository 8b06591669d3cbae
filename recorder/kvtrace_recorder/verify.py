"""The self-check: attention outputs recomputed from the trace, against the model's own.

While recording, a sample of the outputs that the attention kernels returned is put aside; when the
recording ends they are computed again by the trace's own reader, from q, k, v and lse as they were
written. So the whole way is checked: which rows and keys were taken, scale, window, softcap,
sinks, rounding, and reading. A wrong scale shows as errors of tens of percent, float16 storage as
1e-3 to 1e-2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import kvtrace
from kvtrace import attention
from kvtrace.errors import KvtraceError
from kvtrace.model import LayerData
from kvtrace.ranks import NUMBERS_PER_RANK
from kvtrace_recorder.messages import Outputs

Float = NDArray[np.float32]
#: Rows of table `verifications`, by column.
Columns = dict[str, list[Any]]
UNCOMPARED = (
    "no attention output could be compared: the rows, their keys or values are not in the trace,"
    " or their requests were changed by forks"
)


@dataclass
class _Errors:
    """Relative errors of one layer."""

    rows: int = 0
    found: list[Float] = field(default_factory=list)


def compare(path: Path, rank: int, samples: Sequence[Outputs]) -> Columns:
    """Recompute the sampled outputs from a rank's part of a trace.

    Parameters
    ----------
    path : pathlib.Path
        The trace, with everything committed.
    rank : int
        The process that recorded them.
    samples : sequence of Outputs
        What the kernels returned, by the process's own numbers.

    Returns
    -------
    dict
        Columns of table `verifications`, one row for each model and layer that could be compared,
        likewise by the process's own numbers.
    """
    trace = kvtrace.open(path, rank=rank)
    first = rank * NUMBERS_PER_RANK
    forked = set(trace.table("forks")["request"].to_pylist())
    errors: dict[tuple[int, int], _Errors] = {}
    for (layer, request), some in _by_layer(samples).items():
        # What a fork changed may have been sampled before it.
        if first + request in forked:
            continue
        try:
            data = trace.layer_data(layer, first + request)
        except KvtraceError:
            # Its rows were dropped.
            continue
        total = errors.setdefault((data.spec.model - first, layer), _Errors())
        for sample in some:
            found = _relative_errors(data, sample)
            total.rows += len(found)
            total.found.append(found)
    return _columns(errors)


def _by_layer(samples: Iterable[Outputs]) -> Mapping[tuple[int, int], list[Outputs]]:
    found: dict[tuple[int, int], list[Outputs]] = {}
    for sample in samples:
        found.setdefault((sample.layer, sample.request), []).append(sample)
    return found


def _relative_errors(data: LayerData, sample: Outputs) -> Float:
    """[row, q_head] of the rows that the trace holds with everything they saw."""
    rows = np.asarray(sample.positions, np.int64)
    rows, own = rows[rows < data.n], sample.values[rows < data.n]
    if data.q is None or data.k is None or data.v is None or data.lse is None:
        return np.empty((0, own.shape[1]), np.float32)
    keys = np.arange(data.n)
    recomputed = np.empty(own.shape, np.float32)
    for head in range(own.shape[1]):
        of = head // data.spec.group_size
        weights = attention.weights(
            data.q[rows, head], data.k[:, of], data.lse[rows, head], rows, keys, data.spec, head
        )
        seen = attention.visible(rows, keys, data.spec)
        # Keys that no row saw may be missing.
        used = seen.any(axis=0)
        recomputed[:, head] = weights[:, used] @ data.v[used, of]
    apart = np.linalg.norm(recomputed - own, axis=2)
    size = np.linalg.norm(own, axis=2)
    found = np.divide(apart, size, out=np.zeros_like(apart), where=size > 0)
    return np.asarray(found[np.isfinite(found).all(axis=1)])


def _columns(errors: Mapping[tuple[int, int], _Errors]) -> Columns:
    whole = {key: np.concatenate(one.found) for key, one in sorted(errors.items()) if one.rows}
    return {
        "model": [model for model, _ in whole],
        "layer": [layer for _, layer in whole],
        "rows": [len(found) for found in whole.values()],
        "max_error": [float(found.max()) for found in whole.values()],
        "mean_error": [float(found.mean()) for found in whole.values()],
    }
