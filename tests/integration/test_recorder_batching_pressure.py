"""Continuous batching short of blocks: resets, the swap pool, evictions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
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
    prompts,
    sampling,
)
from transformers.generation.continuous_batching import offloading_manager

import kvtrace
from kvtrace_recorder import record

pytestmark = pytest.mark.usefixtures("one_thread", "batching_restored", "writer_thread")


@pytest.fixture
def swap_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """A swap pool without pinned memory, which a machine without an accelerator has not."""

    def empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return torch.empty(*args, **kwargs)

    unpinned = SimpleNamespace(**{**vars(torch), "empty": empty})
    monkeypatch.setattr(offloading_manager, "torch", unpinned)


def pressed(model: Any, **options: Any) -> dict[str, Any]:
    """Requests that together need more blocks than there are."""
    # A cache that slides needs fewer.
    blocks = 20 if model.config.model_type == "llama" else 13
    return generate(model, prompts(18, 15, 17, 16), new=14, num_blocks=blocks, **options)


@pytest.mark.parametrize(("family", "kernel"), [("Llama", "sdpa"), ("GptOss", "eager")])
def test_under_pressure_a_soft_reset_is_a_crop_to_nothing(
    family: str, kernel: str, snapshots: Snapshots, tmp_path: Path
) -> None:
    model = build(family, kernel)
    plain = pressed(model)
    snapshots.clear()
    with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording:
        recorded = pressed(model)

    assert answers(recorded) == answers(plain)
    assert recording.gaps == {}
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    resets = [e["request"] for e in events(trace, "reset")]
    assert resets
    crops = [f for f in trace.table("forks").to_pylist() if f["request"] == f["source"]]
    assert {f["request"] for f in crops} == set(resets)
    check_sequences(trace, recorded)
    check_attention(trace, model)
    check_tables(trace, snapshots)


@pytest.mark.writer_process
@pytest.mark.usefixtures("swap_space")
def test_offloaded_requests_are_restored_and_go_on(snapshots: Snapshots, tmp_path: Path) -> None:
    model = build()
    plain = pressed(model, cpu_offload_space=0.01)
    snapshots.clear()
    with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording:
        recorded = pressed(model, cpu_offload_space=0.01)

    assert answers(recorded) == answers(plain)
    assert recording.gaps == {}
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    offloaded = events(trace, "offload")
    assert offloaded
    assert {e["device"] for e in offloaded} == {"cpu swap"}
    key = [(e["request"], e["block_index"]) for e in offloaded]
    assert key == [(e["request"], e["block_index"]) for e in events(trace, "restore")]
    left = [e for e in events(trace, "free") if e["device"] == "cpu swap"]
    assert [e["block"] for e in left] == [e["block"] for e in offloaded]
    check_sequences(trace, recorded)
    check_attention(trace, model)
    check_tables(trace, snapshots)


def test_cached_blocks_are_evicted_when_others_need_them(
    snapshots: Snapshots, tmp_path: Path
) -> None:
    model, inputs = build(), prompts(21, 22, 23)
    with (
        record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording,
        model.continuous_batching_context_manager(
            generation_config=sampling(), continuous_batching_config=batching(num_blocks=9)
        ) as manager,
    ):
        results = {}
        for ids in inputs:
            name = manager.add_request(ids, eos_token_id=-1)
            results[name] = manager.get_result(name, timeout=200)

    assert recording.gaps == {}
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    check_sequences(trace, results)
    check_tables(trace, snapshots)
    evicted = events(trace, "evict")
    assert evicted
    assert {e["bytes"] for e in evicted} == {0}
    # What is evicted is what had been kept when its request was freed.
    kept = [e["block"] for e in events(trace, "free") if e["bytes"]]
    assert [e["block"] for e in evicted] == kept[: len(evicted)]
