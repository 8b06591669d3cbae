"""The blocks of a paged cache: who holds them, what is cached, and what other pools would do."""

from __future__ import annotations

from kvtrace_viewer.allocation.history import PoolHistory
from kvtrace_viewer.allocation.observed import has_blocks, observe
from kvtrace_viewer.allocation.occupancy import Occupancy, occupancy
from kvtrace_viewer.allocation.residency import metrics, residencies
from kvtrace_viewer.allocation.settings import Settings
from kvtrace_viewer.allocation.whatif import WhatIf, recorded_settings, sweep, what_if
from kvtrace_viewer.allocation.workload import read_workload

__all__ = [
    "Occupancy",
    "PoolHistory",
    "Settings",
    "WhatIf",
    "has_blocks",
    "metrics",
    "observe",
    "occupancy",
    "read_workload",
    "recorded_settings",
    "residencies",
    "sweep",
    "what_if",
]
