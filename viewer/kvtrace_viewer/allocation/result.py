"""What a pool came to, recorded or simulated, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kvtrace.trace import Trace
from kvtrace_viewer.allocation.history import EVICT, Ints, PoolHistory
from kvtrace_viewer.allocation.observed import observe
from kvtrace_viewer.allocation.occupancy import Occupancy, occupancy
from kvtrace_viewer.allocation.residency import Residency, metrics, residencies
from kvtrace_viewer.allocation.waits import absences, first_steps
from kvtrace_viewer.allocation.whatif import WhatIf


@dataclass(frozen=True, eq=False)
class PoolResult:
    """One run of a pool.

    Attributes
    ----------
    history : PoolHistory
        What happened.
    what_if : WhatIf or None
        Of a simulated run; None: as recorded.
    preempted : dict of int to int
        Times that requests gave their blocks up, by request.
    """

    history: PoolHistory
    what_if: WhatIf | None
    preempted: dict[int, int]

    @classmethod
    def of(cls, found: WhatIf) -> PoolResult:
        """Of a simulated run."""
        jobs = found.run.jobs
        counts = {job.asked.request: job.preemptions for job in jobs if job.preemptions}
        return cls(found.history, found, counts)

    @classmethod
    def recorded(cls, trace: Trace) -> PoolResult:
        """Of the recorded pool."""
        events = trace.table("kv_events")
        given_up = events.filter(
            pc.and_(
                pc.is_in(events["event"], pa.array(["reset", "offload"])),
                pc.is_valid(events["request"]),
            )
        )
        # An offload is an event a block: the first of a table stands for all.
        counts: dict[int, int] = {}
        for row in given_up.select(["request", "event", "block_index"]).to_pylist():
            if row["event"] == "reset" or row["block_index"] == 0:
                counts[row["request"]] = counts.get(row["request"], 0) + 1
        return cls(observe(trace), None, counts)

    @property
    def kind(self) -> str:
        """Recorded or what-if."""
        return "recorded" if self.what_if is None else "what-if"

    @cached_property
    def occupancy(self) -> Occupancy:
        """Step by step."""
        return occupancy(self.history)

    @cached_property
    def stays(self) -> list[Residency]:
        """Of every block."""
        return residencies(self.history)

    @cached_property
    def refused(self) -> dict[int, str]:
        """Why requests were not served."""
        return {} if self.what_if is None else self.what_if.run.refused

    @cached_property
    def waits(self) -> dict[int, tuple[int, int]]:
        """Steps and nanoseconds from a request's arrival to its first step, where it is known."""
        history, found = self.history, {}
        for request, first in first_steps(history).items():
            if request not in history.arrival_step:
                continue
            steps = max(0, first - history.arrival_step[request])
            came = history.arrived_ns.get(request, int(history.started_ns[first]))
            found[request] = (steps, max(0, int(history.started_ns[first]) - came))
        return found

    @cached_property
    def preempted_waits(self) -> dict[int, tuple[int, int]]:
        """Steps and nanoseconds that a request missed after preemptions, by request that did."""
        started, found = self.history.started_ns, dict[int, tuple[int, int]]()
        for one in absences(self.history):
            steps, ns = found.get(one.request, (0, 0))
            took = int(started[one.back_step] - started[one.lost_step])
            found[one.request] = (steps + one.steps, ns + took)
        return found

    def bytes_held(self) -> Ints:
        """Bytes of held blocks, by step."""
        return self.occupancy.held * self.history.bytes_per_block

    def to_json(self) -> dict[str, Any]:
        """The numbers as plain values."""
        history, pool = self.history, self.occupancy
        waits = np.array(list(self.waits.values()), np.int64).reshape(-1, 2)
        requests = len(np.unique(history.part_request))
        missed = [steps for steps, _ in self.preempted_waits.values()]
        missed_ns = sum(ns for _, ns in self.preempted_waits.values())
        run = None if self.what_if is None else self.what_if.run
        held = pool.held
        return {
            "kind": self.kind,
            "settings": None if self.what_if is None else self.what_if.settings.to_json(),
            "block_size": history.block_size,
            "pool": history.num_blocks,
            "bytes_per_block": history.bytes_per_block or None,
            "steps": history.steps,
            "requests": requests,
            "refused": [self.refused[r] for r in sorted(self.refused)],
            "preemptions": sum(self.preempted.values()),
            "recomputed_tokens": None if run is None else sum(j.recomputed for j in run.jobs),
            "swapped_blocks": None if run is None else run.swapped_out,
            "cached_tokens": None if run is None else sum(j.found for j in run.jobs),
            "evictions": int((history.kind == EVICT).sum()),
            "peak_blocks": int(held.max(initial=0)),
            "mean_blocks": _mean(held),
            "mean_occupancy": _mean(held / max(1, history.num_blocks)),
            "peak_bytes": int(held.max(initial=0)) * history.bytes_per_block or None,
            "mean_cached_blocks": _mean(pool.cached),
            "peak_shared_blocks": int(pool.shared.max(initial=0)),
            "internal_fragmentation": _mean(pool.internal_fragmentation(history.block_size)),
            "wait_steps_mean": _mean(waits[:, 0]),
            "wait_steps_p95": float(np.percentile(waits[:, 0], 95)) if len(waits) else None,
            "wait_steps_max": int(waits[:, 0].max()) if len(waits) else None,
            "wait_s_mean": _mean(waits[:, 1] / 1e9),
            "preempted_steps_mean": sum(missed) / requests if requests else None,
            "preempted_steps_max": max(missed, default=0),
            "preempted_s_mean": missed_ns / requests / 1e9 if requests else None,
            "span_s": self.span_s,
            "tokens_per_s": int(pool.tokens.sum()) / self.span_s if self.span_s else None,
            **metrics(self.stays),
            "notes": list(history.notes),
        }

    @property
    def span_s(self) -> float:
        """From the first step's start to the last one's end."""
        history = self.history
        if not history.steps:
            return 0.0
        end = history.started_ns[-1] + history.duration_ns[-1]
        return float(end - history.started_ns[0]) / 1e9


def _mean(values: Any) -> float | None:
    return float(np.mean(values)) if len(values) else None
