"""What the pages of one trace have in common: finding it from the URL, and saying why not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvtrace.errors import KvtraceError
from kvtrace.model import Request
from kvtrace.ranks import number_label
from kvtrace.trace import Trace
from kvtrace_viewer.components import Component, empty_state
from kvtrace_viewer.context import Context
from kvtrace_viewer.library import TraceLibrary


def with_trace(
    context: Context,
    trace_id: str | None,
    build: Callable[[str, Trace], Component],
    *,
    needs_tokens: bool = True,
) -> Component:
    """Build a page for the trace of the URL, the newest where it names none.

    A trace that is missing, broken or without the tokens that a page needs becomes an explanation
    instead.
    """
    try:
        chosen = trace_id or context.library.default_id()
        if chosen is None:
            return no_traces(context.library)
        trace = context.library.open(chosen)
        if needs_tokens and not trace.requests():
            if events := _count(trace, "kv_events"):
                return empty_state(
                    "Events only",
                    f"{trace.name} holds {events:,} KV events and no tokens, queries or keys. "
                    "Its tables answer on the SQL page.",
                )
            return empty_state(
                "Nothing recorded yet",
                f"{trace.name} is {trace.status} and holds no token so far. "
                "Reload the page once the model has run.",
            )
        return build(chosen, trace)
    except (KvtraceError, OSError) as error:
        return empty_state("This trace cannot be shown", str(error))


def _count(trace: Trace, table: str) -> int:
    return int(trace.sql(f"select count(*) n from {table}")["n"][0].as_py())


def no_traces(library: TraceLibrary) -> Component:
    """The empty folder."""
    return empty_state(
        f"No traces under {library.root}",
        "Record one: the bundled model runs for about a minute, nothing is downloaded.",
        "kvtrace demo",
    )


def choose_request(requests: Sequence[Request], asked: str | None) -> Request:
    """The request the URL asks for, else the longest."""
    by_id = {str(request.request): request for request in requests}
    longest = max(requests, key=lambda request: request.tokens)
    return by_id.get(asked or "", longest)


def request_options(requests: Sequence[Request]) -> list[dict[str, str]]:
    """Requests for a drop-down, with their lengths."""
    return [
        {
            "value": str(one.request),
            "label": f"{one.external_id or number_label(one.request)} · {one.tokens:,} tokens",
        }
        for one in requests
    ]


def numbered(numbers: Sequence[int]) -> list[dict[str, str]]:
    """Layers or heads by their numbers, for a drop-down whose values are their places."""
    return [{"value": str(at), "label": str(number)} for at, number in enumerate(numbers)]


def place_of(text: Any, numbers: Sequence[int]) -> int:
    """Place of a layer or head in a drop-down, by its number from a URL; the first's if absent."""
    written = [str(number) for number in numbers]
    return written.index(text) if text in written else 0


def one_of(text: str | None, choices: tuple[str, ...], fallback: str) -> str:
    """A choice from a URL; the fallback where it is none of them."""
    return text if text in choices else fallback
