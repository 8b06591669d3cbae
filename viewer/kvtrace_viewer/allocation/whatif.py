"""What-if: a recorded workload on servers with other settings, and what each comes to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from kvtrace.errors import InputError
from kvtrace.trace import Trace
from kvtrace_viewer.allocation.history import PoolHistory
from kvtrace_viewer.allocation.job import Simulation
from kvtrace_viewer.allocation.observed import groups, pool_settings
from kvtrace_viewer.allocation.settings import Settings
from kvtrace_viewer.allocation.simulate import simulate
from kvtrace_viewer.allocation.workload import Workload, read_workload

#: Where no paged cache was recorded.
DEFAULT_BLOCK_SIZE = 16
UNLIMITED = 1_000_000


@dataclass(frozen=True, eq=False)
class WhatIf:
    """A simulated run.

    Attributes
    ----------
    settings : Settings
        Of the server.
    history : PoolHistory
        What happened to the blocks; times are those of `Workload.step_ns`.
    run : Simulation
        Who was served, and how.
    """

    settings: Settings
    history: PoolHistory
    run: Simulation


def recorded_settings(trace: Trace, **given: Any) -> Settings:
    """The settings that were recorded, but those that are given.

    Raises
    ------
    InputError
        Where the pool is neither recorded nor given, and where groups of layers share it.
    """
    if len(groups(trace)) > 1:
        raise InputError(
            f"{trace.path} has {len(groups(trace))} groups of layers with block tables of their"
            " own; a what-if knows one; ask for the recorded pool, without other settings"
        )
    found = pool_settings(trace)
    known = {name: value for name, value in given.items() if value is not None}
    if found is None:
        if "pool" not in known:
            raise InputError(
                f"{trace.path} does not say how large its pool was; a number of blocks was"
                " expected; give --pool 256, say"
            )
        base: dict[str, Any] = {
            "block_size": DEFAULT_BLOCK_SIZE,
            "max_batch": UNLIMITED,
            "max_batch_tokens": 8192,
        }
    else:
        base = {
            "block_size": found["block_size"],
            "pool": found["num_blocks"],
            "max_batch": found["max_batch_size"],
            "max_batch_tokens": found["max_batch_tokens"],
            "policy": "all" if found["prefix_caching"] else "none",
            "preempt": "swap" if found["swap_blocks"] else "recompute",
            "swap_blocks": found["swap_blocks"],
            "scheduler": found["scheduler"],
            "safety_margin": found["safety_margin"],
        }
        if "block_size" in known and "pool" not in known:
            # The same memory in other blocks.
            tokens = found["num_blocks"] * found["block_size"]
            base["pool"] = max(1, tokens // known["block_size"])
    if known.get("preempt") == "swap" and not base.get("swap_blocks"):
        known.setdefault("swap_blocks", known.get("pool", base.get("pool")))
    return Settings(**{**base, **known})


def sweep(
    trace: Trace,
    given: Mapping[str, Sequence[Any]],
    progress: Callable[[float], None] | None = None,
) -> list[WhatIf]:
    """Simulate every combination of the given settings.

    Parameters
    ----------
    trace : Trace
        A recorded run.
    given : mapping of str to sequence
        Values by name of `Settings`; what is not named stays as recorded.
    progress : callable, optional
        Told the share done, 0 to 1.
    """
    workload = read_workload(trace)
    names = [name for name, values in given.items() if values]
    combinations = list(product(*(given[name] for name in names)))
    found = []
    for done, values in enumerate(combinations):
        settings = recorded_settings(trace, **dict(zip(names, values, strict=True)))

        def tell(share: float, done: int = done) -> None:
            if progress:
                progress((done + share) / len(combinations))

        found.append(what_if(workload, settings, tell))
        tell(1.0)
    return found


def what_if(
    workload: Workload, settings: Settings, progress: Callable[[float], None] | None = None
) -> WhatIf:
    """Simulate one server."""
    run = simulate(workload, settings, progress)
    return WhatIf(settings, _history(workload, run), run)


def _history(workload: Workload, run: Simulation) -> PoolHistory:
    columns = run.log.columns()
    parts = np.array(run.parts, np.int64).reshape(-1, 4)
    steps = len(run.clock)
    tokens = np.bincount(parts[:, 0], weights=parts[:, 3], minlength=steps)
    base, each = workload.step_ns()
    duration = (base + each * tokens).astype(np.int64)
    started = _started(workload, np.array(run.clock, np.int64), duration)
    ends = np.concatenate([started, [started[-1] + duration[-1] if steps else 0]])
    jobs = {job.asked.request: job for job in run.jobs}
    return PoolHistory(
        block_size=run.settings.block_size,
        num_blocks=run.settings.pool,
        bytes_per_block=workload.bytes_per_token * run.settings.block_size,
        **columns,
        ts_ns=ends[columns["moment"]],
        started_ns=started,
        duration_ns=duration,
        part_step=parts[:, 0].copy(),
        part_request=parts[:, 1].copy(),
        part_past=parts[:, 2].copy(),
        part_count=parts[:, 3].copy(),
        prompt_tokens={request: job.asked.prompt_tokens for request, job in jobs.items()},
        names={request: job.asked.name for request, job in jobs.items()},
        arrived_ns={request: job.asked.arrived_ns for request, job in jobs.items()},
        arrival_step={
            request: int(np.searchsorted(run.clock, job.asked.arrival_step))
            for request, job in jobs.items()
        },
        notes=workload.notes,
    )


def _started(workload: Workload, clock: Any, duration: Any) -> Any:
    """When each step begins: after the one before, or, where the server was idle, as recorded."""
    origin = int(workload.started_ns[0])
    before = np.concatenate([[0], np.cumsum(duration)[:-1]]) if len(duration) else duration
    jumps = np.flatnonzero(np.diff(clock, prepend=-1) > 1)
    idle = np.zeros(len(clock), np.int64)
    for at in jumps:
        came = int(workload.started_ns[min(clock[at], len(workload.started_ns) - 1)])
        late = came - (origin + before[at] + idle[at])
        idle[at:] += max(0, late)
    return origin + before + idle
