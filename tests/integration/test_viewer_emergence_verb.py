"""`kvtrace emergence`: sinks and heavy hitters over a recorded training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvtrace import Trace
from kvtrace.cli import main
from kvtrace_recorder import record


def test_a_row_a_step_and_every_head_in_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = tmp_path / "training.kvtrace"
    with record(model, path) as recording:
        recording.sample(every=2)
        for _ in range(4):
            model(torch.arange(20)[None], labels=torch.arange(20)[None]).loss.backward()
            optimizer.step()
    assert main(["emergence", str(path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(r["training_step"], r["layer"], r["head"]) for r in rows} == {
        (step, layer, head) for step in (0, 2) for layer in range(2) for head in range(4)
    }
    assert main(["emergence", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "heads with sinks" in shown
    assert "/8" in shown


def test_a_trace_without_training_says_what_to_record(
    synthetic_trace: Callable[[], Trace], capsys: pytest.CaptureFixture[str]
) -> None:
    trace = synthetic_trace()
    assert main(["emergence", str(trace.path)]) == 1
    assert "--sample-every" in capsys.readouterr().err
