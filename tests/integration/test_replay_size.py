"""`--budget A..B/STEP` and `kvtrace size`: curves, and the smallest budget that loses so little."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kvtrace.cli import main
from kvtrace.errors import InputError
from kvtrace.testing import SyntheticTrace
from kvtrace.writer import LayerSpec
from kvtrace_viewer.commands import size as verb
from kvtrace_viewer.replay import replay
from kvtrace_viewer.replay.amounts import parse_budgets
from kvtrace_viewer.replay.sizing import Point, Sizing, size

DECODED = [40] + [1] * 25


def test_ranges_of_budgets() -> None:
    assert [str(b) for b in parse_budgets("5%..20%/5%")] == ["5%", "10%", "15%", "20%"]
    assert [str(b) for b in parse_budgets("0.5%..2%/0.5%")] == ["0.5%", "1%", "1.5%", "2%"]
    assert [str(b) for b in parse_budgets("16..50/16")] == ["16", "32", "48"]
    assert [str(b) for b in parse_budgets("7")] == ["7"]


@pytest.mark.parametrize("text", ["5%..20", "5%..20%", "9..3/1", "1..9%/1", "1..99999/1", "0..4/2"])
def test_wrong_ranges_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="budget"):
        parse_budgets(text)


def test_a_range_is_one_replay_of_each(synthetic_trace: SyntheticTrace) -> None:
    trace = synthetic_trace(steps=DECODED)
    curve = replay(trace, ["lru", "h2o"], ["20%..60%/20%"], store=False)
    apart = [replay(trace, [r.policy], [r.budget], store=False)[0] for r in curve]
    assert [(r.policy, r.budget) for r in curve] == [
        (p, b) for p in ("lru", "h2o") for b in ("20%", "40%", "60%")
    ]
    for one, other in zip(curve, apart, strict=True):
        # Which budgets are replayed together changes the error by its rounding.
        assert one.output_error == pytest.approx(other.output_error, rel=1e-5)
        assert one.to_json() | {"output_error": None} == other.to_json() | {"output_error": None}


def test_the_smallest_budget_is_followed_by_none_that_loses_more() -> None:
    points = [Point(f"{10 * (i + 1)}%", x, None) for i, x in enumerate((0.5, 0.01, 0.03, 0.02, 0))]
    found = Sizing({(None, None): points}, "step", "mass", 0.02)
    assert found.smallest((None, None)) == points[3]
    assert Sizing({(0, 0): points[:3]}, "step", "mass", 0.02).smallest((0, 0)) is None


def test_loss_is_what_the_replays_say(synthetic_trace: SyntheticTrace) -> None:
    trace = synthetic_trace(steps=DECODED)
    found = size(trace, "h2o", 0.2, budgets="10%..100%/30%")
    plain = replay(trace, ["h2o", "oracle"], ["10%..100%/30%"], when="step", store=False)
    for point, mine, best in zip(found.curves[None, None], plain[:4], plain[4:], strict=True):
        assert mine.retained_mass is not None
        assert best.bound is not None
        assert point.loss == 1 - mine.retained_mass
        assert point.capacity == 1 - best.bound
        assert point.capacity <= point.loss + 1e-6
        at = list(zip(mine.heads["layer"], mine.heads["kv_head"], strict=True)).index((1, 0))
        head = next(p for p in found.curves[1, 0] if p.budget == mine.budget)
        assert head.loss == 1 - mine.heads["mass"][at]
        assert head.capacity is not None
        assert head.capacity == 1 - best.heads["bound"][at]
        assert head.capacity <= head.loss + 1e-6
        layer = next(p for p in found.curves[1, None] if p.budget == mine.budget)
        pairs = zip(best.heads["layer"], best.heads["bound"], strict=True)
        bounds = [bound for number, bound in pairs if number == 1]
        assert layer.capacity == pytest.approx(1 - np.mean(bounds))
    assert [p.budget for p in found.curves[0, None]] == ["10%", "40%", "70%", "100%"]


def test_the_verb_counts_bytes(
    synthetic_trace: SyntheticTrace, capsys: pytest.CaptureFixture[str]
) -> None:
    specs = [
        LayerSpec(0, 4, 2, 16, 16, 0.25),
        LayerSpec(1, 4, 2, 16, 16, 0.25, attention_kind="sliding", sliding_window=21),
    ]
    trace = synthetic_trace(steps=DECODED, specs=specs)
    args = ["size", str(trace.path), "--policy", "h2o", "--lose", "30%", "--budget", "10%..90%/20%"]
    assert main([*args, "--context", "100", "--batch", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["budget"] for row in found["curve"]] == ["10%", "30%", "50%", "70%", "90%"]
    model = found["model"]
    assert model["loss"] <= 0.3
    assert model["policy"] == pytest.approx(model["loss"] - model["capacity"])
    assert len(found["layers"]) == 2
    assert len(found["heads"]) == 4
    # 2 KV heads of 16 + 16 values of 2 bytes, 100 tokens, and 20 behind the window of 21.
    assert found["bytes"]["all"]["full"] == 3 * 2 * 64 * (100 + 20)
    percent = int(model["budget"][:-1])
    assert found["bytes"]["all"]["kept"] == 3 * 2 * 64 * (percent + 20 * percent // 100)
    assert main([*args[:-1], "10%..20%/10%"]) == 0
    out = capsys.readouterr().out
    assert "KV cache of 1 x 65 tokens" in out
    assert "one a KV head" in out
    assert trace.replays().num_rows == 0
    for row in (*found["layers"], *found["heads"]):
        assert row["policy"] == pytest.approx(row["loss"] - row["capacity"])
    for kind, rows in (("layer", found["layers"]), ("head", found["heads"])):
        assert sum(row["saved"] for row in rows) == found["bytes"][kind]["saved"]


@pytest.mark.parametrize(("by", "other"), [("layer", "heads"), ("head", "layers")])
def test_one_kind_of_place_can_be_asked_for(
    synthetic_trace: SyntheticTrace, capsys: pytest.CaptureFixture[str], by: str, other: str
) -> None:
    path = str(synthetic_trace(steps=DECODED).path)
    args = ["size", path, "--policy", "adakv:window=4", "--lose", "9%", "--budget", "10%..100%/45%"]
    assert main([*args, "--when", "step", "--by", by, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert other not in found
    # What heads share their budgets, the bound is over: the layer's, not one head's.
    assert ({row["capacity"] for row in found[f"{by}s"]} == {None}) == (by == "head")
    assert main([*args, "--when", "step", "--by", by]) == 0
    assert ("KV head 0" in capsys.readouterr().out) == (by == "head")


def test_what_is_chosen_per_query_is_read_and_saves_no_memory(
    synthetic_trace: SyntheticTrace, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(synthetic_trace(steps=DECODED).path)
    args = ["size", path, "--policy", "quest", "--lose", "50%", "--budget", "50%..100%/50%"]
    assert main([*args, "--when", "step"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Read by a query, of what stays stored of the KV cache" in out
    assert "saved" not in out
    assert main([*args, "--when", "step", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes_are"] == "read"
    assert main([*args[:3], "top_k", *args[4:], "--when", "step", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["model"]
    assert found["model"]["budget"] == best["budget"]
    assert found["model"]["capacity"] == pytest.approx(best["loss"])
    assert best["policy"] == pytest.approx(0)


def test_what_cannot_be_sized_is_refused(
    synthetic_trace: SyntheticTrace, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(synthetic_trace(steps=[30]).path)
    for more in (["--lose", "1%"], ["--lose", "3"], ["--lose", "1%", "--batch", "0"]):
        assert main(["size", path, "--policy", "h2o", *more]) == 1
        assert capsys.readouterr().err.startswith("error: ")
    assert main(["size", path, "--policy", "h2o", "--lose", "0.1"]) == 1
    assert "'0.1'; a percentage was expected" in capsys.readouterr().err
    assert "Example: kvtrace size" in (verb.__doc__ or "")
