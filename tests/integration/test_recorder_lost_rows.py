"""Rows that do not reach the trace are a gap, and none of their request stand behind it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.tiny import IDS, gaps, greedy
from transformers import DynamicCache

import kvtrace
from kvtrace_recorder import pipeline, record
from kvtrace_recorder.session import held, sending
from kvtrace_recorder.session.copies import LayerParts
from kvtrace_recorder.session.run_rows import RunRows
from kvtrace_recorder.session.session import Session

pytestmark = pytest.mark.usefixtures("one_thread", "writer_thread")

PROMPT = IDS.shape[1]
ONE = torch.tensor([[3]])


@pytest.fixture(autouse=True)
def _sent_when_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps wait until a test has them sent."""
    monkeypatch.setattr(held, "IDLE_NS", 1 << 62)
    monkeypatch.setattr(held, "HELD_NS", 1 << 62)


def lost(path: Path) -> dict[str, int]:
    """Tokens that are not in a trace, by reason."""
    return {gap["reason"]: gap["count"] for gap in gaps(path) if gap["what"] == "tokens"}


def decode(model: Any, cache: DynamicCache, steps: int) -> None:
    for _ in range(steps):
        model(ONE, past_key_values=cache, use_cache=True)


def test_steps_that_come_while_earlier_ones_are_refused_are_not_sent(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, goes = threading.Event(), threading.Event()
    original = pipeline.Pipeline.reserve

    def reserve(self: pipeline.Pipeline, *args: Any) -> Any:
        if threading.current_thread().name != "kvtrace-tick":
            return original(self, *args)
        waits.set()
        goes.wait()
        return None

    monkeypatch.setattr(pipeline, "TICK_SECONDS", 0.005)
    cache = DynamicCache()
    with record(model, tmp_path / "a.kvtrace", strict=True) as recording, torch.no_grad():
        model(IDS, past_key_values=cache, use_cache=True)
        decode(model, cache, 4)
        monkeypatch.setattr(pipeline.Pipeline, "reserve", reserve)
        monkeypatch.setattr(held, "IDLE_NS", 0)
        assert waits.wait(100)
        decode(model, cache, 3)
        monkeypatch.setattr(held, "IDLE_NS", 1 << 62)
        goes.set()
        monkeypatch.setattr(pipeline.Pipeline, "reserve", original)
        decode(model, cache, 2)
    assert (recording.rows, lost(tmp_path / "a.kvtrace")) == (
        # The first decode step ends what was held before it.
        recording.rows,
        {pipeline.QUEUE_FULL: PROMPT + 9 - recording.rows},
    )
    (request,) = kvtrace.open(tmp_path / "a.kvtrace").requests()
    assert request.tokens == recording.rows <= PROMPT + 1


def test_a_large_step_is_not_sent_where_small_ones_before_it_are_refused(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What was held finds no room; layers of large steps do.
    monkeypatch.setattr(sending.Sender, "_filled", lambda self, parcel: None)
    cache = DynamicCache()
    with record(model, tmp_path / "a.kvtrace", strict=True) as recording, torch.no_grad():
        model(IDS, past_key_values=cache, use_cache=True)
        model(torch.full((1, 80), 5), past_key_values=cache, use_cache=True)
    assert recording.rows == 0
    assert lost(tmp_path / "a.kvtrace") == {pipeline.QUEUE_FULL: PROMPT + 80}


@pytest.mark.parametrize("where", [LayerParts, RunRows])
def test_a_copy_that_fails_is_a_gap_and_gives_its_room_back(
    where: type, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = greedy(model)
    monkeypatch.setattr(where, "copy", _raising(RuntimeError("out of memory")))
    with record(model, tmp_path / "a.kvtrace", on_full="wait") as recording:
        assert torch.equal(greedy(model), plain)
        assert torch.equal(greedy(model), plain)
    assert recording._opened.queued_bytes == 0
    (reason,) = lost(tmp_path / "a.kvtrace")
    assert "the copies tap failed and went silent: RuntimeError: out of memory" in reason
    assert sum(lost(tmp_path / "a.kvtrace").values()) == 22 - recording.rows
    assert recording.steps == 12


@pytest.mark.parametrize("where", [LayerParts, RunRows])
def test_an_interrupt_in_the_middle_of_a_copy_is_a_gap_where_the_program_goes_on(
    where: Any, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = where.copy
    cache = DynamicCache()
    with record(model, tmp_path / "a.kvtrace", on_full="wait") as recording, torch.no_grad():
        model(IDS, past_key_values=cache, use_cache=True)
        decode(model, cache, 4 if where is RunRows else 0)
        monkeypatch.setattr(where, "copy", _raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            cache.crop(-1)
        monkeypatch.setattr(where, "copy", original)
        cache.crop(-1)
        decode(model, cache, 2)
        greedy(model)
    assert recording._opened.queued_bytes == 0
    found = lost(tmp_path / "a.kvtrace")
    assert list(found) == ["KeyboardInterrupt came while these rows were copied"]
    first, second = ([r.tokens for r in kvtrace.open(tmp_path / "a.kvtrace").requests()] + [0])[:2]
    whole = PROMPT + 2 + (4 if where is RunRows else 0)
    assert recording.rows + sum(found.values()) == whole + 11
    assert 11 in (first, second)


def test_rows_on_their_way_when_a_signal_ends_the_recording_are_a_gap(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = record(model, tmp_path / "a.kvtrace", strict=True)
    original = RunRows.copy

    def handled(*args: Any) -> None:
        # As a handler does that runs in the model's thread, which does not come back.
        monkeypatch.setattr(RunRows, "copy", original)
        recording.__exit__(None, None, None)
        raise SystemExit

    cache = DynamicCache()
    recording.__enter__()
    with torch.no_grad():
        model(IDS, past_key_values=cache, use_cache=True)
        decode(model, cache, 5)
        monkeypatch.setattr(RunRows, "copy", handled)
        with pytest.raises(SystemExit):
            cache.crop(-1)
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert trace.status == "complete"
    (count,) = lost(tmp_path / "a.kvtrace").values()
    assert (count > 0, trace.rows + count) == (True, PROMPT + 5)
    assert "ended while these rows were on their way" in gaps(tmp_path / "a.kvtrace")[0]["reason"]


def test_a_run_that_another_thread_has_just_emptied_is_left_alone(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a step's end and the question how long its run has waited."""
    original = Session.end

    def end(self: Session, step: Any, output: Any, elapsed_ns: int) -> None:
        if (run := step.run) is not None:
            ended = run.ended

            def emptied(*args: Any) -> bool:
                found = bool(ended(*args))
                self.flush_held()
                return found

            monkeypatch.setattr(run, "ended", emptied)
        original(self, step, output, elapsed_ns)

    monkeypatch.setattr(Session, "end", end)
    with record(model, tmp_path / "a.kvtrace", strict=True) as recording:
        greedy(model)
    assert (recording.rows, recording.gaps) == (11, {})


def _raising(error: BaseException) -> Callable[..., Any]:
    def copy(*args: Any) -> Any:
        raise error

    return copy
