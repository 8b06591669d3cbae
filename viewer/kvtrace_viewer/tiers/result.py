"""What a workload on a machine came to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.blocks.stream import BlockStream
from kvtrace_viewer.tiers.decode import Batches
from kvtrace_viewer.tiers.hardware import Hardware
from kvtrace_viewer.tiers.options import Options
from kvtrace_viewer.tiers.residency import Longs
from kvtrace_viewer.tiers.schedule import Ledger
from kvtrace_viewer.tiers.spread import spread


@dataclass(frozen=True, eq=False)
class TierResult:
    """One workload on one machine.

    Attributes
    ----------
    hardware : Hardware
        The machine.
    options : Options
        The rules.
    block_bytes : int
        Bytes of a block, over all layers.
    capacities : tuple of int
        Blocks that fit in each tier.
    ledger : Ledger
        Everything by request; `schedule.Ledger` says what.
    arrival_ns : numpy.ndarray
        int64 [request].
    prompt_tokens : numpy.ndarray
        int64 [request].
    request_ids : numpy.ndarray
        int64 [request], the trace's numbers of them.
    moved : numpy.ndarray
        int32 [move, 3], see `Residency.moved`.
    blocks : BlockStream
        What was served: full blocks.
    batches : Batches or None
        Prompts and decoding together; None where only prompts are served.
    notes : tuple of str
        What must be known to read it.
    """

    hardware: Hardware
    options: Options
    block_bytes: int
    capacities: tuple[int, ...]
    ledger: Ledger
    arrival_ns: Longs
    prompt_tokens: Longs
    request_ids: Longs
    moved: NDArray[np.int32]
    blocks: BlockStream
    batches: Batches | None = None
    notes: tuple[str, ...] = ()

    @property
    def served(self) -> Any:
        """Whether each request fitted: bool [request]."""
        return self.ledger.end_ns >= 0

    @property
    def ttft_ns(self) -> Longs:
        """From arrival to the first token, of those served: int64 [request]."""
        return np.asarray((self.ledger.end_ns - self.arrival_ns)[self.served])

    @property
    def stall_ns(self) -> Longs:
        """Of start to end what is not computing, of those served: int64 [request]."""
        took = self.ledger.end_ns - self.ledger.start_ns
        return np.asarray((took - self.ledger.work_ns)[self.served])

    @property
    def span_ns(self) -> int:
        """From the first arrival to the last first token."""
        if not self.served.any():
            return 0
        return int(self.ledger.end_ns.max() - self.arrival_ns.min())

    def to_json(self) -> dict[str, Any]:
        """The result as plain values."""
        ledger, size = self.ledger, self.block_bytes
        span = self.span_ns / 1e9
        tiers = []
        for number, tier in enumerate(self.hardware.tiers):
            up, down = (int(moved[:, number].sum()) for moved in (ledger.up, ledger.down))
            held = ledger.occupancy[:, number]
            tiers.append(
                {
                    "tier": tier.name,
                    "capacity_blocks": self.capacities[number],
                    "hits": int(ledger.found[:, number].sum()),
                    "bytes_up": up * size,
                    "bytes_down": down * size,
                    "link_busy": _share(up * size / tier.read, span) if number else None,
                    "peak_bytes": int(held.max(initial=0)) * size,
                    "mean_bytes": float(held.mean()) * size if len(held) else 0.0,
                    "cost_per_hour": tier.cost_per_hour,
                }
            )
        return {
            "kind": "blocks",
            "hardware": self.hardware.name,
            **self.options.to_json(),
            "block_bytes": size,
            "requests": len(self.arrival_ns),
            "refused": int((~self.served).sum()),
            "tiers": tiers,
            "recomputed": int(ledger.recomputed.sum()),
            "missed": int(ledger.missed.sum()),
            "dropped": int(ledger.dropped.sum()),
            "ttft_s": spread(self.ttft_ns),
            "stall_s": spread(self.stall_ns),
            "compute_s": float(ledger.work_ns.sum()) / 1e9,
            "span_s": span,
            "prompt_tokens_per_s": _share(float(self.prompt_tokens[self.served].sum()), span),
            "decode": None if self.batches is None else self.batches.to_json(),
            "notes": list(self.notes),
        }


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
