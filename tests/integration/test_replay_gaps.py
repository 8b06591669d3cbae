"""Traces with gaps: what is replayed of them equals the whole run's replay, and is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvtrace
from kvtrace import Trace
from kvtrace.cli import main
from kvtrace.errors import InputError
from kvtrace.testing import SyntheticTrace
from kvtrace.writer import LayerSpec, TraceWriter
from kvtrace_viewer.replay import replay
from kvtrace_viewer.replay.gaps import LeftOut
from kvtrace_viewer.replay.regret import compute_regrets

STEPS = [40, *[1] * 20]
SPECS = [LayerSpec(layer, 4, 2, 16, 16, 0.25) for layer in range(2)]


def written(full: Trace, path: Path, until: int = 60, gap: int | None = None) -> Trace:
    """The first rows of a run; layer 1 has none at the step of row `gap`."""
    prompt = full.requests()[0].prompt_tokens
    with TraceWriter(path, source="synthetic", dtype="float32") as writer:
        writer.add_model(name="synthetic", num_layers=2)
        writer.add_layers(0, SPECS)
        writer.append("requests", full.table("requests").to_pydict())
        rows = full.table("rows").to_pydict()
        for step, at in enumerate([slice(0, prompt), *(slice(i, i + 1) for i in range(40, until))]):
            writer.append("steps", {"step": [step], "model": [0], "phase": ["decode"]})
            writer.append("rows", {name: values[at] for name, values in rows.items()})
            for spec in SPECS:
                data = full.layer_data(spec.layer)
                if spec.layer == 1 and at.start == gap:
                    writer.skip_layer(0, 1, "its rows were lost")
                else:
                    arrays: Any = {kind: getattr(data, kind)[at] for kind in ("q", "k", "v", "lse")}
                    writer.append_layer(0, spec.layer, **arrays)
        writer.append("tokens", {n: v[:until] for n, v in full.table("tokens").to_pydict().items()})
    return kvtrace.open(path)


def test_a_replay_ends_before_a_row_whose_keys_are_missing(
    synthetic_trace: SyntheticTrace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = synthetic_trace(steps=STEPS, specs=SPECS)
    holed = written(full, tmp_path / "holed.kvtrace", gap=52)
    short = written(full, tmp_path / "short.kvtrace", until=52)
    policies = ["h2o", "snapkv:window=8", "oracle"]
    pairs = list(zip(*(replay(x, policies, ["25%"], "step") for x in (holed, short)), strict=True))
    for found, want in pairs:
        assert found.to_json() | {"left_out": [], "notes": []} == want.to_json()
        assert want.left_out == ()
        (gone,) = found.left_out
        assert (gone.request, gone.positions.tolist()) == (0, list(range(52, 60)))
        assert (found.evicted_at[52:] == -1).all()
        for layer, heads in want.kept().items():
            for head, positions in heads.items():
                np.testing.assert_array_equal(found.kept()[layer][head], positions)
    for name, (found, _) in zip(policies, pairs, strict=True):
        (regrets,) = compute_regrets(holed, {name: found.evicted_at}).values()
        assert found.retained_mass is not None
        lost = (1 - found.retained_mass) * found.measured_rows * 8
        assert regrets.total == pytest.approx(lost, rel=1e-5)
    rows = holed.sql("select * from replay_gaps where replay like 'h2o%'").to_pylist()
    assert [(r["request"], r["first_position"], r["last_position"], r["count"]) for r in rows] == [
        (0, 52, 59, 8)
    ]
    args = ["replay", str(holed.path), "--policy", "h2o", "--budget", "25%", "--when", "step"]
    assert main(args) == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert "note: request 0, rows 52-59 are left out: keys or values of a layer are missing" in said
    assert main([*args, "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert [(x["request"], x["rows"], x["count"]) for x in result["left_out"]] == [(0, "52-59", 8)]


def test_a_request_without_any_whole_row_is_refused(
    synthetic_trace: SyntheticTrace, tmp_path: Path
) -> None:
    full = synthetic_trace(steps=STEPS, specs=SPECS)
    with pytest.raises(InputError, match="no keys at its first token"):
        replay(written(full, tmp_path / "a.kvtrace", gap=0), ["h2o"], ["25%"])


def test_rows_that_were_never_recorded_are_named_with_the_reason(
    synthetic_trace: SyntheticTrace,
) -> None:
    trace = synthetic_trace(steps=STEPS, specs=SPECS)
    with TraceWriter(
        trace.path.parent / "b.kvtrace", source="synthetic", dtype="float32"
    ) as writer:
        kvtrace.testing.write_synthetic(writer, SPECS, STEPS)
        writer.add_gap("tokens", 7, "the queue was full", step=3)
        writer.add_gap("k values", 1, "narrowed")
    (found,) = replay(kvtrace.open(trace.path.parent / "b.kvtrace"), ["h2o"], ["25%"])
    assert [one.to_json() for one in found.left_out] == [
        {"request": None, "rows": None, "count": 7, "reason": "tokens: the queue was full"}
    ]


def test_stretches_of_positions() -> None:
    some = LeftOut.of(3, np.array([0, 4, 5, 6, 9]), "lost")
    assert some.ranges() == [(0, 0), (4, 6), (9, 9)]
    assert str(some) == "request 3, rows 0,4-6,9 are left out: lost"
    many = LeftOut.of(0, np.arange(0, 4000, 2), "lost")
    assert len(str(many)) < 160
    assert "(2,000 rows)" in str(many)
