"""The writer behind a recording: in a process or a thread, slow, full, failing or killed."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.tiny import IDS, gaps, greedy
from transformers import DynamicCache, LlamaForCausalLM

import kvtrace
from kvtrace.errors import TraceError
from kvtrace_recorder import pipeline, record
from kvtrace_recorder.scribe import Scribe
from kvtrace_recorder.session import held

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.usefixtures("writer_thread")
def test_a_thread_writes_where_no_process_can_be_started(model: Any, tmp_path: Path) -> None:
    with record(model, tmp_path / "a.kvtrace", strict=True) as recording:
        greedy(model)
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert (trace.status, trace.rows, recording.rows) == ("complete", 11, 11)
    np.testing.assert_allclose(trace.attention(1, 3).sum(axis=1), 1, atol=1e-5)


def test_a_writer_process_that_is_killed_leaves_the_model_alone(
    model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = greedy(model)
    with record(model, tmp_path / "a.kvtrace", on_full="wait") as recording:
        greedy(model)
        while kvtrace.open(tmp_path / "a.kvtrace").rows < 11:
            time.sleep(0.01)
        os.kill(recording.writer_pid or 0, signal.SIGKILL)
        assert torch.equal(greedy(model), plain)
        time.sleep(0.2)
        assert torch.equal(greedy(model), plain)
    assert "writer's process ended before the recording" in capsys.readouterr().err
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert (trace.status, trace.rows) == ("cut off", 11)


def test_a_trace_that_cannot_be_written_any_more_leaves_the_model_alone(
    model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = greedy(model)
    tables = tmp_path / "a.kvtrace" / "rank-00000" / "tables"
    with record(model, tmp_path / "a.kvtrace"):
        shutil.rmtree(tables, ignore_errors=True)
        tables.write_text("in the way")
        assert torch.equal(greedy(model), plain)
    assert f"writing {tmp_path / 'a.kvtrace'} failed: " in capsys.readouterr().err


@pytest.mark.usefixtures("writer_thread")
def test_a_writer_that_fails_leaves_the_model_alone(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    plain = greedy(model)
    monkeypatch.setattr(Scribe, "write", full)
    with record(model, tmp_path / "a.kvtrace", on_full="wait"):
        assert torch.equal(greedy(model), plain)
    assert "No space left on device" in capsys.readouterr().err
    with (
        pytest.raises(TraceError, match="No space left"),
        record(model, tmp_path / "b.kvtrace", strict=True),
    ):
        greedy(model)


class _Brake:
    """Holds the writer thread until released."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        original = Scribe.write

        def write(*args: Any) -> None:
            self.go.wait()
            original(*args)

        monkeypatch.setattr(Scribe, "write", write)


@pytest.mark.usefixtures("writer_thread")
def test_a_full_queue_drops_whole_steps_and_says_so(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brake = _Brake(monkeypatch)
    monkeypatch.setattr(held, "STEPS", 1)
    with record(model, tmp_path / "a.kvtrace", queue_bytes=2000) as recording:
        greedy(model)
        brake.go.set()
        while recording.steps < 6:
            time.sleep(0.01)
        greedy(model, max_new_tokens=1)
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    first, second = trace.requests()
    assert 6 <= first.tokens < 11
    assert second.tokens == 6
    lost = 11 - first.tokens
    (gap,) = gaps(tmp_path / "a.kvtrace")
    assert (gap["what"], gap["count"]) == ("tokens", lost)
    assert "whole steps are dropped" in gap["reason"]
    assert recording.dropped_tokens >= 1
    assert trace.table("steps").num_rows == 7
    assert trace.attention(1, 3).shape == (first.tokens, first.tokens)


@pytest.mark.usefixtures("writer_thread")
def test_on_full_wait_loses_nothing(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brake = _Brake(monkeypatch)
    threading.Timer(0.3, brake.go.set).start()
    with record(model, tmp_path / "a.kvtrace", queue_bytes=6000, on_full="wait") as recording:
        greedy(model)
    assert (recording.rows, recording.gaps) == (11, {})


@pytest.mark.usefixtures("writer_thread")
def test_threads_that_wait_for_a_slow_writer_do_not_wait_for_ever(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Scribe.write

    def slow(*args: Any) -> None:
        time.sleep(0.03)
        original(*args)

    monkeypatch.setattr(Scribe, "write", slow)
    monkeypatch.setattr(held, "STEPS", 4)
    monkeypatch.setattr(pipeline, "TICK_SECONDS", 0.005)
    monkeypatch.setattr(held, "IDLE_NS", 5_000_000)
    others = [LlamaForCausalLM(model.config).eval() for _ in range(3)]
    path = tmp_path / "a.kvtrace"
    with record(None, path, queue_bytes=2000, on_full="wait", strict=True) as recording:
        threads = [
            threading.Thread(target=greedy, args=(other,), kwargs={"max_new_tokens": 40})
            for other in others
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (recording.rows, recording.gaps) == (3 * 45, {})


def test_steps_that_come_while_earlier_ones_wait_for_room_are_sent(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "TICK_SECONDS", 0.005)
    monkeypatch.setattr(held, "IDLE_NS", 1 << 62)
    # The model's thread would send after so long, and wait for the other, which waits for it.
    monkeypatch.setattr(held, "HELD_NS", 1 << 62)
    waits, goes = threading.Event(), threading.Event()
    original = pipeline.Pipeline.reserve

    def reserve(self: pipeline.Pipeline, *args: Any) -> Any:
        if threading.current_thread().name == "kvtrace-tick":
            waits.set()
            goes.wait()
        return original(self, *args)

    cache, ids = DynamicCache(), torch.tensor([[3]])
    with record(model, tmp_path / "a.kvtrace") as recording, torch.no_grad():
        model(IDS, past_key_values=cache, use_cache=True)
        for _ in range(4):
            model(ids, past_key_values=cache, use_cache=True)
        monkeypatch.setattr(pipeline.Pipeline, "reserve", reserve)
        monkeypatch.setattr(held, "IDLE_NS", 0)
        assert waits.wait(100)
        # The run's first steps are on their way; it goes on, and its cache ends meanwhile.
        for _ in range(3):
            model(ids, past_key_values=cache, use_cache=True)
        del cache
        gc.collect()
        goes.set()
    assert (recording.rows, recording.gaps) == (IDS.shape[1] + 7, {})
