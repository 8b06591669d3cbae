"""Tiers of a recorded run: its own model and pace, and its tokens placed by a replay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.tiny import greedy, llama

import kvtrace
from kvtrace.cli import main
from kvtrace_recorder import record
from kvtrace_viewer.memory import read_model
from kvtrace_viewer.replay import replay
from kvtrace_viewer.tiers import LLAMA_3_8B
from kvtrace_viewer.tiers.recorded import recorded_model

pytestmark = pytest.mark.usefixtures("one_thread", "writer_thread")


def test_the_recorded_model_is_the_one_that_is_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.kvtrace"
    model = llama()
    with record(model, path, strict=True):
        greedy(model)
    trace = kvtrace.open(path)
    found = recorded_model(trace)
    assert found is not None
    memory = read_model(str(path))
    # Two layers of two KV heads of 8 numbers, keys and values, in float32.
    assert found.kv_bytes_per_token == memory.bytes_per_token == 2 * 2 * 8 * 2 * 4
    assert found.weights == 4 * sum(one.numel() for one in model.parameters())
    prefill = trace.sql("select sum(duration_ns)::bigint n from steps where phase = 'prefill'")
    assert found.ns_per_token == prefill["n"][0].as_py() / 6
    assert main(["tiers", str(path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["block_bytes"] == 16 * found.kv_bytes_per_token
    assert shown["compute_s"] == pytest.approx(prefill["n"][0].as_py() / 1e9)
    assert shown["recorded"]["ttft_s"] > 0
    # Told otherwise.
    assert main(["tiers", str(path), "--model", "llama-3-8b", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["block_bytes"] == 16 * LLAMA_3_8B.kv_bytes_per_token
    assert main(["tiers", str(path), "--compute", "machine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["compute_s"] < 1e-6


def test_tokens_are_placed_over_the_recorded_steps(tmp_path: Path) -> None:
    from kvtrace_viewer.tiers import read_hardware
    from kvtrace_viewer.tiers.tokens import place_tokens

    path = tmp_path / "a.kvtrace"
    model = llama()
    with record(model, path, strict=True):
        greedy(model)
    trace = kvtrace.open(path)
    [result] = replay(trace, ["streaming_llm:sinks=1"], [3], when="step")
    found = place_tokens(trace, result.id, read_hardware("h100"))
    # Six of the prompt, then five are fed again: three stay, of each layer and KV head.
    assert found.rows.tolist() == [0, 1, 1, 1, 1, 1]
    assert found.held[-1].tolist() == [3 * 4 * 64, (11 - 3) * 4 * 64]
    assert found.tokens[0].first_cold.tolist() == [-1, 5, 5, 5, 6, 7, 8, 9, 10, -1, -1]
    assert found.hits == result.hits
    assert found.misses == result.misses
    durations = trace.sql("select sum(duration_ns)::bigint n from steps where phase = 'decode'")
    assert found.compute_ns.sum() == durations["n"][0].as_py()
