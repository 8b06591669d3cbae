"""Pools of blocks: the recorded one and what-ifs, their histories, and simulating more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import BaseModel

from kvtrace.errors import InputError
from kvtrace.trace import Trace
from kvtrace_viewer.context import Context
from kvtrace_viewer.derived.identity import identity
from kvtrace_viewer.derived.pools import encode_history, pool_history, pool_runs

#: What-ifs of one press of the button.
MAX_RUNS = 24


class PoolOrder(BaseModel):
    """What the Simulate button sends; empty: as recorded."""

    trace: str
    pool: list[int] = []
    block_size: list[int] = []
    max_batch: list[int] = []
    admission: list[str] = []
    policy: list[str] = []
    preempt: list[str] = []


def router(context: Context) -> APIRouter:
    """Routes over the pools of a trace."""
    routes = APIRouter()

    @routes.get("/pools")
    def list_runs(trace: str) -> list[dict[str, Any]]:
        return pool_runs(context.library.open(trace))

    @routes.get("/pools/history")
    def history(trace: str, run: str) -> Response:
        opened = context.library.open(trace)
        key = (identity(opened), "pool", run)
        found = context.tiles.get(key, lambda: encode_history(pool_history(opened, run)))
        headers = {"Cache-Control": "no-store"}
        return Response(found, media_type="application/json", headers=headers)

    @routes.post("/pools")
    def simulate(order: PoolOrder) -> dict[str, Any]:
        trace = context.library.open(order.trace)
        return context.jobs.start_work("what-if", work(trace, order)).to_json()

    return routes


def work(trace: Trace, order: PoolOrder) -> Callable[[Callable[[float], None]], list[str]]:
    """What a job does for an order.

    Raises
    ------
    InputError
        For more combinations than one press of the button may ask.
    """
    # Imported here because they pull in numba, which takes a second the first time.
    from kvtrace_viewer.allocation.observed import has_blocks
    from kvtrace_viewer.allocation.result import PoolResult
    from kvtrace_viewer.allocation.storage import store
    from kvtrace_viewer.allocation.whatif import sweep

    given = {name: list(values) for name, values in order if name != "trace"}
    runs = 1
    for values in given.values():
        runs *= max(1, len(values))
    if runs > MAX_RUNS:
        raise InputError(
            f"{runs} combinations were asked for; at most {MAX_RUNS} at once were expected; leave"
            " some values out, or use kvtrace allocation"
        )

    def simulate(progress: Callable[[float], None]) -> list[str]:
        if has_blocks(trace):
            store(trace, PoolResult.recorded(trace))
        found = [PoolResult.of(one) for one in sweep(trace, given, progress)]
        return [store(trace, one) for one in found]

    return simulate
