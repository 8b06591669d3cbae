"""How long a decode step waits for what its layers fetch: whole nanoseconds."""

from __future__ import annotations

import numpy as np

from kvtrace_viewer.replay.jit import jit
from kvtrace_viewer.replay.kernels import Longs


def transfer_ns(bytes_moved: Longs, bandwidth: float, latency_ns: int) -> Longs:
    """Time of a transfer of so many bytes at so many a second; none where nothing moves."""
    took = np.ceil(np.asarray(bytes_moved, np.float64) * (1e9 / bandwidth)).astype(np.int64)
    return np.where(bytes_moved > 0, took + latency_ns, 0)


@jit
def stalls(compute_ns: Longs, fetch_ns: Longs, ahead: bool) -> Longs:
    """How much longer each step takes than its computing: int64 [step].

    A layer computes when the layer before is done and its own keys are there. Its fetch needs the
    link, and begins when the layer before has computed (its query says which keys it needs), or,
    with `ahead`, when the layer before begins to (which needs a guess of that query).

    Parameters
    ----------
    compute_ns : int64 [step]
        Computing of each step, shared equally by its layers.
    fetch_ns : int64 [step, layer]
        Time that each layer's fetch holds the link; 0 where it fetches nothing.
    ahead : bool
        Whether a layer's keys are known a layer ahead.
    """
    steps, layers = fetch_ns.shape
    found = np.zeros(steps, np.int64)
    for s in range(steps):
        began = 0
        ended = 0
        link_free = 0
        for layer in range(layers):
            asked = began if ahead else ended
            start = ended
            if fetch_ns[s, layer] > 0:
                link_free = max(link_free, asked) + fetch_ns[s, layer]
                start = max(start, link_free)
            began = start
            of_layer = compute_ns[s] * (layer + 1) // layers - compute_ns[s] * layer // layers
            ended = start + of_layer
        found[s] = ended - compute_ns[s]
    return found
