"""Tier runs: started from the page, their series and their maps."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import numpy as np
from fastapi import APIRouter
from pydantic import BaseModel

from kvtrace.errors import InputError
from kvtrace.trace import Trace
from kvtrace_viewer.context import Context
from kvtrace_viewer.derived.tiers import levels, residency, series, tier_run, tier_runs
from kvtrace_viewer.figures.tier_series import occupancy, tier_colours, traffic, waiting


class Figures(BaseModel):
    """What the page says of one tier: bytes, and bytes per second."""

    capacity: int
    read: float
    write: float


class TierOrder(BaseModel):
    """What the Run button sends."""

    trace: str
    machine: str
    tiers: list[Figures]
    replay: str | None = None
    policy: str = "lru"
    mode: str = "evict"
    load: str = "cheaper"
    overlap: bool = True
    prefetch: bool = False
    max_batch: int = 0


def router(context: Context) -> APIRouter:
    """Routes over the tier runs of a trace."""
    routes = APIRouter()

    @routes.get("/tiers")
    def list_runs(trace: str) -> list[dict[str, Any]]:
        return tier_runs(context.library.open(trace))

    @routes.get("/tiers/run")
    def one_run(trace: str, run: str, scheme: str = "light") -> dict[str, Any]:
        opened = context.library.open(trace)
        found, dark = series(opened, run), "dark" if scheme == "dark" else "light"
        tiers = levels(opened, run)
        names = [str(tier["name"]) for tier in tiers]
        seconds = found.seconds.tolist()
        up, down = found.up.tolist(), found.down.tolist()
        compute, stall = found.compute.tolist(), found.stall.tolist()
        return {
            "run": tier_run(opened, run),
            "levels": tiers,
            "colours": tier_colours(dark)[: len(tiers)],
            "occupancy": occupancy(seconds, found.held.tolist(), names, dark),
            "traffic": traffic(seconds, up, down, names, dark),
            "waiting": waiting(seconds, compute, stall, dark),
        }

    @routes.get("/tiers/residency")
    def map_of(
        trace: str, run: str, first: int = 0, count: int | None = None, request: int | None = None
    ) -> dict[str, Any]:
        found = residency(context.library.open(trace), run, first, count, request)
        lists = ("steps", "index", "tokens", "accesses")
        return {
            "first": found.first,
            "size": found.size,
            "count": found.count,
            "shape": list(found.counts.shape),
            "counts": base64.b64encode(found.counts.astype("<i4").tobytes()).decode(),
            **{name: np.asarray(getattr(found, name)).tolist() for name in lists},
        }

    @routes.post("/tiers")
    def start(order: TierOrder) -> dict[str, Any]:
        trace = context.library.open(order.trace)
        return context.jobs.start_work("tier run", work(trace, order)).to_json()

    return routes


def work(trace: Trace, order: TierOrder) -> Callable[[Callable[[float], None]], list[str]]:
    """What a job does for an order; what is wrong in it is said at once.

    Raises
    ------
    InputError
        For an unknown machine or rule, and figures that are none.
    """
    # Imported here because they pull in numba, which takes a second the first time.
    from kvtrace_viewer.blocks import read_stream
    from kvtrace_viewer.tiers import LLAMA_3_8B, Options, read_hardware, replay_tiers, shipped
    from kvtrace_viewer.tiers.recorded import recorded_model, recorded_times
    from kvtrace_viewer.tiers.storage import store_blocks, store_tokens
    from kvtrace_viewer.tiers.tokens import place_tokens

    # A browser names machines; it must not name files.
    if order.machine not in shipped():
        raise InputError(f"no machine {order.machine!r}; expected one of {', '.join(shipped())}")
    hardware = read_hardware(order.machine)
    if len(order.tiers) != len(hardware.tiers):
        raise InputError(
            f"{len(order.tiers)} tiers given; {hardware.name} has {len(hardware.tiers)}"
        )
    for tier, given in zip(hardware.tiers, order.tiers, strict=True):
        if given.capacity < 0 or not 1 <= given.read < 1e18 or not 1 <= given.write < 1e18:
            raise InputError(f"{tier.name} has no capacity or bandwidth; expected numbers above 0")
        figures = given.model_dump()
        if any(getattr(tier, name) != value for name, value in figures.items()):
            hardware = hardware.with_figure(tier.name, **figures)
    options = Options(
        policy=order.policy,
        mode=order.mode,
        load=order.load,
        overlap=order.overlap,
        prefetch=order.prefetch,
        max_batch=order.max_batch,
    )

    def place(progress: Callable[[float], None]) -> list[str]:
        found = place_tokens(trace, str(order.replay), hardware, options, progress=progress)
        return [store_tokens(trace, found)]

    def serve(progress: Callable[[float], None]) -> list[str]:
        model = recorded_model(trace) or LLAMA_3_8B
        found = replay_tiers(read_stream(trace), hardware, model, options)
        progress(0.9)
        return [store_blocks(trace, found, model.name, recorded_times(trace))]

    return serve if order.replay is None else place
