"""Requests of a batch are replayed one by one, whatever the order of their rows in the trace."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import kvtrace
from kvtrace import Trace
from kvtrace.cli import main
from kvtrace.errors import InputError
from kvtrace.model import Layer
from kvtrace.testing import log_sum_exp
from kvtrace.writer import LayerSpec, TraceWriter
from kvtrace_viewer.replay import replay

SPEC = LayerSpec(0, 4, 2, 8, 8, 0.35)
PROMPTS = (30, 21)
DECODED = 20


def write_batch(path: Path, chosen: tuple[int, ...]) -> Trace:
    """Write a synthetic batch: prompts in one step, then a row of each request per step."""
    sources = {r: make_request(r) for r in chosen}
    with TraceWriter(path, source="synthetic", dtype="float32") as writer:
        model = writer.add_model(name="synthetic")
        writer.add_layers(model, [SPEC])
        prompts = [PROMPTS[r] for r in chosen]
        requests = {"request": list(chosen), "run": [0] * len(chosen), "model": [0] * len(chosen)}
        writer.append("requests", {**requests, "prompt_tokens": prompts})
        done = dict.fromkeys(chosen, 0)
        for step in range(DECODED + 1):
            counts = {r: PROMPTS[r] if step == 0 else 1 for r in chosen}
            write_step(writer, step, counts, done, sources)
    return kvtrace.open(path)


def make_request(request: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(request)
    tokens = PROMPTS[request] + DECODED
    shapes = {"q": (tokens, 4, 8), "k": (tokens, 2, 8), "v": (tokens, 2, 8)}
    found = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    layer = Layer(model=0, array_group=0, array_index=0, **vars(SPEC))
    return {**found, "lse": log_sum_exp(found["q"], found["k"], layer)}


def write_step(
    writer: TraceWriter,
    step: int,
    counts: dict[int, int],
    done: dict[int, int],
    sources: dict[int, dict[str, np.ndarray]],
) -> None:
    total = sum(counts.values())
    positions = {r: np.arange(done[r], done[r] + n) for r, n in counts.items()}
    writer.append("steps", {"step": [step], "model": [0]})
    columns = {
        "row": np.arange(writer.rows, writer.rows + total),
        "step": np.full(total, step),
        "request": np.repeat(list(counts), list(counts.values())),
        "position": np.concatenate(list(positions.values())),
        "has_query": np.ones(total, bool),
    }
    writer.append("rows", columns)
    parts = {
        name: np.concatenate([sources[r][name][positions[r]] for r in counts])
        for name in ("q", "k", "v", "lse")
    }
    writer.append_layer(0, 0, **parts)
    for r, n in counts.items():
        done[r] += n


def test_a_batch_gives_what_its_requests_give_alone(tmp_path: Path) -> None:
    both = write_batch(tmp_path / "both.kvtrace", (0, 1))
    policies, budgets = ["h2o", "lru", "oracle"], ["25%"]
    together = replay(both, policies, budgets, when="step")
    alone = [
        replay(write_batch(tmp_path / f"{r}.kvtrace", (r,)), policies, budgets, when="step")
        for r in (0, 1)
    ]
    for i, result in enumerate(together):
        parts = [results[i] for results in alone]
        assert result.tokens == sum(PROMPTS) + 2 * DECODED
        assert result.hits == sum(part.hits for part in parts)
        assert result.evictions == sum(part.evictions for part in parts)
        masses = [part.retained_mass for part in parts]
        assert result.retained_mass == pytest.approx(np.mean([m for m in masses if m]))
        for r, part in enumerate(parts):
            rows = both.request_rows(r)
            np.testing.assert_array_equal(result.evicted_at[rows], part.evicted_at)
            kept, want = result.kept(r), part.kept()
            assert [kept[0][h].tolist() for h in (0, 1)] == [want[0][h].tolist() for h in (0, 1)]
        with pytest.raises(InputError, match="--request N"):
            result.kept()


def test_one_request_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_batch(tmp_path / "both.kvtrace", (0, 1)).path
    args = ["replay", str(path), "--policy", "lru", "--budget", "9", "--when", "step"]
    kept = str(tmp_path / "kept.json")
    assert main([*args, "--kept", kept]) == 1
    assert "--request N" in capsys.readouterr().err
    assert main([*args, "--kept", kept, "--request", "1", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["tokens"] == PROMPTS[1] + DECODED
    assert found["id"] == "lru-9-step-request=1"
    assert len(json.loads(Path(kept).read_text())["lru@9"]["0"]["1"]) == 9
