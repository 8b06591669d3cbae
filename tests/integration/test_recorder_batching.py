"""Continuous batching, on tiny random models: rows, forks and blocks as the manager had them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.batching import (
    PAGE,
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

import kvtrace
from kvtrace.block_tables import block_tables
from kvtrace_recorder import record

pytestmark = pytest.mark.usefixtures("one_thread", "batching_restored", "writer_thread")


@pytest.mark.parametrize(
    ("family", "kernel"),
    [("Llama", "sdpa"), ("Llama", "eager"), ("Qwen3", "sdpa"), ("GptOss", "eager")],
)
def test_a_batch_is_recorded_as_it_ran(family: str, kernel: str, tmp_path: Path) -> None:
    model, inputs = build(family, kernel), prompts(21, 7, 30, 13)
    plain = generate(model, inputs)
    with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording:
        recorded = generate(model, inputs)

    assert answers(recorded) == answers(plain)
    assert recording.gaps == {}
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert trace.status == "complete"
    check_sequences(trace, recorded)
    check_attention(trace, model)
    assert trace.rows == sum(
        len(r.prompt_ids) + len(r.generated_tokens) - 1 for r in plain.values()
    )


def test_blocks_grow_with_a_request_and_are_freed_with_it(
    snapshots: Snapshots, tmp_path: Path
) -> None:
    model, inputs = build(), prompts(9, 14)
    with record(model, tmp_path / "a.kvtrace", strict=True):
        generate(model, inputs, allow_block_sharing=False)
    trace = kvtrace.open(tmp_path / "a.kvtrace")

    check_tables(trace, snapshots)
    assert block_tables(trace) == {}
    kinds = {e["event"] for e in trace.table("kv_events").to_pylist()}
    assert kinds == {"allocate", "free"}
    # 9 + 8 and 14 + 8 tokens in pages of 4.
    assert len(events(trace, "allocate")) == len(events(trace, "free")) == 5 + 6
    block = PAGE * 2 * 2 * 2 * 12 * 4
    assert {e["bytes"] for e in events(trace, "allocate")} == {block}
    assert {e["bytes"] for e in events(trace, "free")} == {0}
    grown = [e["step"] for e in events(trace, "allocate")]
    assert grown == sorted(grown)
    assert grown.count(0) == 3 + 4


@pytest.mark.writer_process
def test_outputs_are_verified_from_the_trace(tmp_path: Path) -> None:
    model, inputs = build(), prompts(40, 21)
    with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True, verify=True):
        generate(model, inputs, max_batch_tokens=32)
    found = kvtrace.open(tmp_path / "a.kvtrace").table("verifications").to_pylist()
    assert [row["layer"] for row in found] == [0, 1]
    assert all(row["rows"] > 4 and row["max_error"] < 1e-5 for row in found)


def test_a_cancelled_request_gives_its_blocks_back(snapshots: Snapshots, tmp_path: Path) -> None:
    model, inputs = build(), prompts(21, 9)
    with (
        record(None, tmp_path / "a.kvtrace", strict=True) as recording,
        model.continuous_batching_context_manager(
            generation_config=sampling(200),
            continuous_batching_config=batching(allow_block_sharing=False, num_blocks=128),
        ) as manager,
    ):
        manager.add_request(inputs[0], request_id="left", streaming=True, eos_token_id=-1)
        manager.add_request(inputs[1], request_id="stays", max_new_tokens=60, eos_token_id=-1)
        assert manager.get_result("left", timeout=200) is not None
        manager.cancel_request("left")
        while (result := manager.get_result("stays", timeout=200)) is None:
            pass

    assert len(result.generated_tokens) == 60
    assert recording.gaps == {}
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert set(names(trace).values()) == {"left", "stays"}
    check_tables(trace, snapshots)
    assert block_tables(trace) == {}
    by_name = {name: trace.tokens(number).num_rows for number, name in names(trace).items()}
    assert by_name["stays"] == 9 + 59
    assert 21 < by_name["left"] < 21 + 199


@pytest.mark.writer_process
def test_two_managers_at_once_keep_their_requests_apart(tmp_path: Path) -> None:
    models = [build(), build("Qwen3")]
    inputs = [prompts(21, 7, 30), prompts(12, 26)]
    with (
        record(None, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording,
        ThreadPoolExecutor(2) as pool,
    ):
        results = list(pool.map(generate, models, inputs))

    assert recording.gaps == {}
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    architectures = trace.table("models")["architecture"].to_pylist()
    rows = trace.table("requests").to_pylist()
    for model, found in zip(models, results, strict=True):
        number = architectures.index(type(model).__name__)
        own = {row["external_id"]: row["request"] for row in rows if row["model"] == number}
        assert set(own) == set(found)
        model.set_attn_implementation("eager")
        for name, result in found.items():
            tokens = trace.tokens(own[name])["token_id"].to_pylist()
            assert tokens == (result.prompt_ids + result.generated_tokens)[:-1]
            with torch.no_grad():
                expected = model(torch.tensor([tokens]), output_attentions=True).attentions
            attention = trace.attention(1, 3, request=own[name])
            np.testing.assert_allclose(attention, expected[1][0, 3].numpy(), atol=1e-5)
