"""Memory tiers: a workload's blocks over HBM, DRAM, NVMe and remote memory. Headless.

>>> from kvtrace_viewer.tiers import read_hardware, replay_tiers
>>> replay_tiers(read_stream(trace), read_hardware("h100")).to_json()          # doctest: +SKIP
"""

from kvtrace_viewer.tiers.hardware import Hardware, Tier, read_hardware, shipped
from kvtrace_viewer.tiers.options import Options
from kvtrace_viewer.tiers.result import TierResult
from kvtrace_viewer.tiers.run import LLAMA_3_8B, ServedModel, replay_tiers

__all__ = [
    "LLAMA_3_8B",
    "Hardware",
    "Options",
    "ServedModel",
    "Tier",
    "TierResult",
    "read_hardware",
    "replay_tiers",
    "shipped",
]
