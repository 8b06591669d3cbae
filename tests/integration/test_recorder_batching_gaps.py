"""What cannot be recorded of continuous batching is a gap, and the manager goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.batching import (
    Snapshots,
    answers,
    batching,
    build,
    check_attention,
    check_sequences,
    check_tables,
    events,
    generate,
    names,
    prompts,
    sampling,
)
from transformers.generation.continuous_batching import offloading_manager
from transformers.modeling_utils import PreTrainedModel

import kvtrace
from kvtrace_recorder import record
from kvtrace_recorder.pipeline import Pipeline
from kvtrace_recorder.session.paged_cache import PagedCacheState

pytestmark = pytest.mark.usefixtures("one_thread", "batching_restored", "writer_thread")


def test_what_was_computed_before_the_recording_is_not_made_up(
    snapshots: Snapshots, tmp_path: Path
) -> None:
    model, (first, second, other) = build(), prompts(23, 19, 14, shared=9)
    other = other[::-1]
    with model.continuous_batching_context_manager(
        generation_config=sampling(), continuous_batching_config=batching()
    ) as manager:
        manager.add_request(first, request_id="before", eos_token_id=-1)
        assert manager.get_result("before", timeout=200) is not None
        snapshots.clear()
        with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording:
            results = {}
            for name, ids in (("late", second), ("other", other)):
                manager.add_request(ids, request_id=name, eos_token_id=-1)
                results[name] = manager.get_result(name, timeout=200)

    ((reason, count),) = recording.gaps.items()
    assert "before the recording began" in reason
    # Two pages of its prompt were in the cache; the rest was processed and cannot be told.
    assert count == 19 + 8 - 8
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    check_sequences(trace, {"other": results["other"]})
    assert set(names(trace).values()) == {"late", "other"}
    check_attention(trace, model)


def test_a_step_that_was_dropped_takes_what_builds_on_it_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = build(), prompts(23, 19, 22, shared=9)
    inputs[2] = inputs[2][::-1]
    refused: list[int] = []
    reserve = Pipeline.reserve

    def once(self: Any, *args: Any) -> Any:
        refused.append(1)
        return None if len(refused) == 1 else reserve(self, *args)

    monkeypatch.setattr(Pipeline, "reserve", once)
    results = {}
    with (
        record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording,
        model.continuous_batching_context_manager(
            generation_config=sampling(), continuous_batching_config=batching()
        ) as manager,
    ):
        for ids in inputs:
            name = manager.add_request(ids, eos_token_id=-1)
            results[name] = manager.get_result(name, timeout=200)

    # All of the first, and what the second did not take from it.
    assert sum(recording.gaps.values()) == 23 + 8 + 19 + 8 - 8
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert trace.table("forks").num_rows == 0
    check_sequences(trace, {"req_2": results["req_2"]})
    check_attention(trace, model)


def test_a_tap_that_fails_in_the_managers_thread_leaves_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, inputs = build(), prompts(21, 7)
    plain = generate(model, inputs)
    noted = PagedCacheState.block

    def failing(self: Any, *args: Any, **kwargs: Any) -> None:
        if args[4] == "free":
            raise RuntimeError("boom")
        noted(self, *args, **kwargs)

    monkeypatch.setattr(PagedCacheState, "block", failing)
    with record(model, tmp_path / "a.kvtrace", dtype="float32") as recording:
        recorded = generate(model, inputs)
    assert answers(recorded) == answers(plain)
    assert capsys.readouterr().err.count("kvtrace: the paged cache tap failed") == 1
    assert len(recording.gaps) == 1
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    # The steps before the failure are whole.
    check_sequences(trace, recorded)
    check_attention(trace, model)


def test_batches_that_run_no_python_are_gaps(
    snapshots: Snapshots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = build(), prompts(21, 7)
    plain = generate(model, inputs)
    snapshots.clear()
    with record(model, tmp_path / "a.kvtrace") as recording, monkeypatch.context() as replaying:
        # As a CUDA graph that is replayed: the model is not called.
        replaying.setattr(PreTrainedModel, "__call__", torch.nn.Module.__call__)
        recorded = generate(model, inputs)
    assert answers(recorded) == answers(plain)
    ((reason, count),) = recording.gaps.items()
    assert "use_cuda_graph=False" in reason
    assert count == 21 + 8 + 7 + 8
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert trace.rows == 0
    # Who ran, when, in which batch and in which blocks is known all the same.
    assert sorted(names(trace).values()) == ["req_0", "req_1"]
    assert trace.table("steps")["num_tokens"].to_pylist() == [28, *[2] * 8]
    check_tables(trace, snapshots)


def test_another_versions_batching_is_a_gap_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = build(), prompts(21, 7)
    plain = generate(model, inputs)
    monkeypatch.delattr(offloading_manager.OffloadingManager, "free_request_cpu_cache")
    with record(model, tmp_path / "a.kvtrace", strict=True) as recording:
        recorded = generate(model, inputs)
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert answers(recorded) == answers(plain)
    (reason,) = recording.gaps
    assert "OffloadingManager.free_request_cpu_cache" in reason
    assert kvtrace.open(tmp_path / "a.kvtrace").rows == 6


def test_a_model_that_is_not_asked_for_leaves_no_trace(tmp_path: Path) -> None:
    model, other = build(), build("Qwen3")
    with record(model, tmp_path / "a.kvtrace", strict=True) as recording:
        generate(other, prompts(9))
        generate(model, prompts(9))
    assert recording.gaps == {}
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert trace.table("models")["architecture"].to_pylist() == ["LlamaForCausalLM"]
    assert {e["request"] for e in events(trace, "allocate")} == {
        r.request for r in trace.requests()
    }
