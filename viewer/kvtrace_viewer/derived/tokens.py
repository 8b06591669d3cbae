"""Token texts for display."""

from __future__ import annotations

from kvtrace.trace import Trace


def token_texts(trace: Trace, request: int) -> list[str]:
    """Text of every token by position; the id in brackets where the trace has no text.

    Raises
    ------
    InputError
        For a request the trace does not have.
    """
    trace.request_rows(request)
    table = trace.tokens(request)
    texts: list[str | None] = table["text"].to_pylist()
    ids: list[int | None] = table["token_id"].to_pylist()
    return [
        text if text is not None else f"[{token_id}]"
        for text, token_id in zip(texts, ids, strict=True)
    ]
