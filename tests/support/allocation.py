"""Workloads for tests of allocation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvtrace_viewer.allocation.workload import Asked, Workload


def workload(lengths: Sequence[tuple[int, int, int]], shared: int = 0, steps: int = 1) -> Workload:
    """A synthetic workload: prompt tokens, answer tokens and arrival step of each request.

    The first `shared` tokens of all prompts are the same, all other tokens different.
    """
    requests = []
    for number, (prompt, answer, arrival) in enumerate(lengths):
        tokens = np.arange(prompt + answer - 1) + 1000 * (number + 1)
        tokens[: min(shared, prompt)] = np.arange(min(shared, prompt))
        requests.append(
            Asked(number, f"req_{number}", prompt, answer, tokens, arrival, 10 * arrival)
        )
    clock = 10 * np.arange(steps)
    return Workload(
        tuple(sorted(requests, key=lambda one: one.arrived_ns)),
        clock,
        np.full(steps, 10),
        np.ones(steps, np.int64),
        bytes_per_token=8,
    )
