"""Replay results: the list, what was evicted when, mass over time, and running new ones."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import BaseModel

from kvtrace.cached import cached_layers, cached_requests, not_together
from kvtrace.errors import InputError
from kvtrace.model import number_text
from kvtrace.trace import Trace
from kvtrace_viewer.api.downloads import csv_response
from kvtrace_viewer.context import Context
from kvtrace_viewer.derived.results import evicted_at, replay_rows, replay_steps
from kvtrace_viewer.figures.budget_curve import budget_curve
from kvtrace_viewer.figures.retained_mass import MassSeries, retained_mass


class ReplayOrder(BaseModel):
    """What the Run button sends."""

    trace: str
    policies: list[str]
    budgets: list[str]
    when: str | None = None
    request: int | None = None


def router(context: Context) -> APIRouter:
    """Routes over the replays of a trace."""
    routes = APIRouter()

    @routes.get("/replays")
    def list_replays(trace: str) -> list[dict[str, Any]]:
        return replay_rows(context.library.open(trace))

    @routes.get("/evicted")
    def evicted(trace: str, replay: str, layer: int, kv_head: int, request: int = 0) -> Response:
        """Int32 by position: the query position after which each key was evicted, -1 = never."""
        opened = context.library.open(trace)
        check_kv_head(opened, request, layer, kv_head)
        column = evicted_at(opened, replay, layer, kv_head, request)
        return Response(
            column.astype("<i4").tobytes(),
            media_type="application/octet-stream",
            headers={"Cache-Control": "no-store"},
        )

    @routes.get("/sinks")
    def sinks(trace: str, layer: int, kv_head: int, request: int = 0) -> list[int]:
        """Positions that are a sink in any query head that reads this KV head."""
        opened = context.library.open(trace)
        check_kv_head(opened, request, layer, kv_head)
        return sink_positions(context, opened, request, layer, kv_head)

    @routes.get("/mass")
    def mass(trace: str, replays: str, request: int = 0, scheme: str = "light") -> dict[str, Any]:
        """Series of the replays given (ids split by spaces) and the figure of them."""
        opened = context.library.open(trace)
        num_tokens = len(opened.request_rows(request))
        series = {one: replay_steps(opened, one, request) for one in replays.split()}
        lines = [
            MassSeries(steps["label"], steps["position"], steps["mass"])
            for steps in series.values()
        ]
        dark = "dark" if scheme == "dark" else "light"
        return {"series": series, "figure": retained_mass(lines, num_tokens, dark)}

    @routes.get("/curve")
    def curve(trace: str, scheme: str = "light") -> dict[str, Any]:
        """The figure of retained mass over budget; null where nothing was replayed at two."""
        rows = replay_rows(context.library.open(trace))
        return {"figure": budget_curve(rows, "dark" if scheme == "dark" else "light")}

    @routes.get("/mass.csv")
    def mass_csv(trace: str, replays: str, request: int = 0) -> Response:
        opened = context.library.open(trace)
        found = {one: replay_steps(opened, one, request) for one in replays.split()}
        return csv_response(mass_rows(found), f"{opened.name}-request{request}-mass.csv")

    @routes.post("/replays")
    def run(order: ReplayOrder) -> dict[str, Any]:
        trace = context.library.open(order.trace)
        requests = None if order.request is None else _together_with(trace, order.request)
        job = context.jobs.start(trace, order.policies, order.budgets, order.when, requests)
        return job.to_json()

    @routes.get("/jobs/{job_id}")
    def job(job_id: int) -> dict[str, Any]:
        return context.jobs.get(job_id).to_json()

    return routes


def mass_rows(found: dict[str, dict[str, Any]]) -> list[list[Any]]:
    """A header, then one row a replay and measured query."""
    columns = ("position", "mass", "held", "evictions")
    rows: list[list[Any]] = [["replay", *columns]]
    for replay, steps in found.items():
        rows += [
            [replay, *values] for values in zip(*(steps[name] for name in columns), strict=True)
        ]
    return rows


def _together_with(trace: Trace, request: int) -> list[int] | None:
    """What is replayed for the request that is shown: all, or it alone where some cannot be."""
    return [request] if not_together(trace, cached_requests(trace)) else None


def check_kv_head(trace: Trace, request: int, layer: int, kv_head: int) -> None:
    """Refuse a layer or KV head that the request lacks."""
    heads = {spec.layer: spec.kv_head_numbers for spec in cached_layers(trace, [request])}
    if kv_head not in heads.get(layer, []):
        raise InputError(
            f"no KV head {kv_head} in layer {layer}; the trace has layers "
            f"{number_text(list(heads))}, and layer {layer} KV heads "
            f"{number_text(heads.get(layer, []))}"
        )


def sink_positions(
    context: Context, trace: Trace, request: int, layer: int, kv_head: int
) -> list[int]:
    """Find the sinks of a KV head; none where the trace holds no queries to tell by."""
    if not {"q", "k", "lse"} <= trace.holdings(request).layers.get(layer, frozenset()):
        return []
    group = next(s.group_size for s in trace.layers_of(request) if s.layer == layer)
    heads = range(kv_head * group, (kv_head + 1) * group)
    found = {
        mark.position
        for head in heads
        for mark in context.head_marks(trace, request, layer, head)
        if mark.kind == "sink"
    }
    return sorted(found)
