"""How requests are called in a drop-down."""

from __future__ import annotations

from kvtrace.model import Request
from kvtrace.ranks import NUMBERS_PER_RANK
from kvtrace_viewer.pages.common import request_options


def asked(number: int, external_id: str | None = None) -> Request:
    return Request(number, 0, 1200, 12, external_id, None, 0, None)


def test_a_request_of_another_rank_is_called_by_rank_and_number() -> None:
    options = request_options([asked(3), asked(2 * NUMBERS_PER_RANK + 1), asked(0, "chat-7")])
    assert [one["label"] for one in options] == [
        "3 · 1,200 tokens",
        "rank 2: 1 · 1,200 tokens",
        "chat-7 · 1,200 tokens",
    ]
    assert options[1]["value"] == "2000000001"
