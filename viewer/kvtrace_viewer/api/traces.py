"""The list of traces, and the tokens of a request."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from kvtrace_viewer.context import Context
from kvtrace_viewer.derived.summary import summaries
from kvtrace_viewer.derived.tokens import token_texts


def router(context: Context) -> APIRouter:
    """Routes over the library."""
    routes = APIRouter()

    @routes.get("/traces")
    def list_traces() -> list[dict[str, Any]]:
        return summaries(context.library)

    @routes.get("/tokens")
    def tokens(trace: str, request: int = 0) -> dict[str, Any]:
        opened = context.library.open(trace)
        return {"tokens": token_texts(opened, request), "status": opened.status}

    return routes
