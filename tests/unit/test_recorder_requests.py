"""The book of requests, as the threads of a program find it."""

from __future__ import annotations

from collections import deque
from typing import Any

from kvtrace_recorder.messages import Ended
from kvtrace_recorder.session.requests import RequestBook


class Raced(deque[Any]):
    """Emptied by another thread between the question and the answer."""

    def __bool__(self) -> bool:
        return True


def test_who_ended_is_told_to_one_thread_of_two() -> None:
    book = RequestBook()
    book.ended = Raced([Ended((3,), None)])
    assert book.take_ended() == [Ended((3,), None)]
    assert book.take_ended() == []
