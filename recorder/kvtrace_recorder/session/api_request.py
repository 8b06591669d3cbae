"""The id under which a serving API knows what the running code works for."""

from __future__ import annotations

from contextvars import ContextVar

#: None outside a server.
api_request: ContextVar[str | None] = ContextVar("kvtrace_api_request", default=None)
