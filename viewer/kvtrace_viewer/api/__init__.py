"""Routes under /api: JSON, raw bytes and downloads for the pages."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from kvtrace.errors import KvtraceError, TraceError
from kvtrace_viewer.api import maps, pools, query, replays, tiers, traces
from kvtrace_viewer.context import Context


def register(server: FastAPI, context: Context) -> None:
    """Add every route, and the answer to errors, to an application."""
    server.add_exception_handler(KvtraceError, _explain)
    server.add_api_route("/healthz", _health, include_in_schema=False)
    for module in (traces, maps, replays, pools, tiers, query):
        server.include_router(module.router(context), prefix="/api")


def _health() -> dict[str, str]:
    return {"status": "ok"}


def _explain(_request: Request, error: Exception) -> Response:
    """Answer a user's mistake with its one line."""
    status = 404 if isinstance(error, TraceError) else 400
    return JSONResponse({"error": str(error)}, status_code=status)
