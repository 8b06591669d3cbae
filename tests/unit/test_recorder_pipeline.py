"""What the pipeline owes: bytes it lent are given back, however its writer or the system fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from kvtrace_recorder import pipeline
from kvtrace_recorder.messages import Message, Sequenced, StepBatch, StepRecord
from kvtrace_recorder.pipeline import Pipeline
from kvtrace_recorder.writer.process import Answer
from kvtrace_recorder.writer.slabs import Slab, SlabPool

ROOM = 4000


class FakeWriter:
    """A writer that takes messages and never writes one, until it dies."""

    pid = None

    def __init__(self, options: dict[str, Any]) -> None:
        self.dies = threading.Event()
        self.sent: list[Message] = []

    def send(self, number: int, message: Message, slabs: Sequence[Slab]) -> None:
        self.sent.append(message)

    def forget(self, slab: Slab) -> None:
        pass

    def end(self, *, complete: bool) -> None:
        self.dies.set()

    def answers(self) -> Iterator[Answer]:
        yield Answer("opened", True, None)
        self.dies.wait()

    def wait(self) -> int:
        return 1


class NoTexts:
    def of(self, source: str, token_id: int) -> str | None:
        return None


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Pipeline, FakeWriter]]:
    writers: list[FakeWriter] = []

    def start(options: dict[str, Any]) -> FakeWriter:
        writers.append(FakeWriter(options))
        return writers[-1]

    monkeypatch.setattr(pipeline, "WriterProcess", start)
    made = Pipeline(
        {}, NoTexts(), queue_bytes=ROOM, on_full="wait", progress=False, on_tick=lambda: None
    )
    # The batches need no model.
    made._sources[0] = ""
    yield made, writers[0]
    made.close(complete=False)


def batch(rows: int) -> StepBatch:
    sequences = [Sequenced(0, 0, 0, rows, new=True)]
    return StepBatch(0, [StepRecord("prefill", 1, rows, 0, sequences=sequences)])


def until(holds: Callable[[], bool]) -> None:
    changed = threading.Event()
    for _ in range(10_000):
        if holds():
            return
        changed.wait(0.01)
    raise AssertionError("it never came to hold")


def test_what_a_dead_writer_was_lent_comes_back(piped: tuple[Pipeline, FakeWriter]) -> None:
    found, writer = piped
    for rows in (3, 4):
        slab = found.reserve(1000)
        assert slab is not None
        found.put(batch(rows), [slab])
    until(lambda: len(writer.sent) == 2)
    writer.dies.set()
    until(lambda: found.failure is not None)
    assert found.queued_bytes == 0
    assert found.dropped_tokens == 7


def test_what_is_put_after_the_writer_died_is_let_go(piped: tuple[Pipeline, FakeWriter]) -> None:
    found, writer = piped
    slab = found.reserve(1000)
    assert slab is not None
    writer.dies.set()
    until(lambda: found.failure is not None)
    found.put(batch(5), [slab])
    assert (found.queued_bytes, found.dropped_tokens) == (0, 5)
    assert found.reserve(1000) is None


def test_a_message_that_cannot_be_sent_ends_the_writer(
    piped: tuple[Pipeline, FakeWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, writer = piped

    def refuse(number: int, message: Message, slabs: Sequence[Slab]) -> None:
        raise TypeError("a set is no part of a message")

    monkeypatch.setattr(writer, "send", refuse)
    found.put(batch(2), [])
    assert writer.dies.wait(100)
    until(lambda: found.failure is not None)
    assert "a set is no part of a message" in str(found.failure)


def test_memory_that_the_system_refuses_is_not_counted(
    piped: tuple[Pipeline, FakeWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = piped

    def refuse(self: SlabPool, nbytes: int) -> Slab:
        raise OSError("no descriptors left")

    with monkeypatch.context() as patched:
        patched.setattr(SlabPool, "get", refuse)
        with pytest.raises(OSError, match="no descriptors left"):
            found.reserve(ROOM)
    # With the refused bytes still counted this would wait for ever.
    slab = found.reserve(ROOM)
    assert slab is not None
    found.give_back([slab])
    assert found.queued_bytes == 0
