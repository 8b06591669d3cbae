"""`kvtrace replay` and `replay()` on synthetic traces: results, what is stored, what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

import kvtrace
from kvtrace.cli import main
from kvtrace.errors import InputError
from kvtrace.testing import SyntheticTrace, write_synthetic
from kvtrace.writer import LayerSpec, TraceWriter
from kvtrace_viewer.derived.results import replay_rows
from kvtrace_viewer.replay import POLICIES, Budget, Head, Policy, replay, replayable
from kvtrace_viewer.replay.policies.snapkv import SnapKV

KEYS = {
    "policy",
    "budget",
    "when",
    "exactness",
    "tokens",
    "hits",
    "misses",
    "evictions",
    "retained_sinks",
    "retained_mass",
    "output_error",
    "ties",
}
DECODED = [40] + [1] * 25


def test_json_has_every_key_and_nothing_beats_the_bound(
    synthetic_trace: SyntheticTrace, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = synthetic_trace(steps=DECODED)
    names = ["full", "sliding_window", "streaming_llm", "lru", "h2o", "oracle"]
    policies = [word for name in names for word in ("--policy", name)]
    args = ["replay", str(trace.path), *policies, "--budget", "25%", "--budget", "12"]
    assert main([*args, "--when", "step", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(r["policy"], r["budget"]) for r in found] == [
        (n, b) for n in names for b in ("25%", "12")
    ]
    bounds = {r["budget"]: r["bound"] for r in found if r["policy"] == "oracle"}
    for r in found:
        assert set(r) >= KEYS
        assert r["when"] == "step"
        assert r["tokens"] == 65
        assert r["measured_rows"] == 25
        if r["policy"] == "full":
            assert r["retained_mass"] == pytest.approx(1, abs=1e-5)
            assert (r["misses"], r["evictions"], r["output_error"]) == (0, 0, 0)
        else:
            assert r["hits"] > 0
            assert r["misses"] > 0
            assert 0 < r["retained_mass"] <= bounds[r["budget"]] + 1e-6


def test_what_is_stored_is_what_was_returned(synthetic_trace: SyntheticTrace) -> None:
    trace = synthetic_trace(steps=DECODED)
    results = replay(trace, ["h2o:sinks=2", "oracle"], ["25%"], when="step")
    table = trace.replays()
    assert table["replay"].to_pylist() == ["h2o.sinks=2-25pct-step", "oracle-25pct-step"]
    for result, row in zip(results, table.to_pylist(), strict=True):
        for name in ("hits", "misses", "evictions", "retained_mass", "bound", "ties", "sinks"):
            assert row[name] == getattr(result, name)
        store = trace.replay(result.id)
        assert store.complete
        np.testing.assert_array_equal(store.array("evicted_at").read(0, 65), result.evicted_at)
        steps = store.table("replay_steps").to_pydict()
        assert steps["position"] == list(range(40, 65))
        assert sum(steps["hits"]) == result.hits
        assert np.mean(steps["mass"]) == pytest.approx(result.retained_mass)
        assert min(steps["mass_worst"]) == result.mass_worst
        assert set(steps["held"]) <= {4 * (n // 4) for n in range(41, 66)}
        heads = store.table("replay_heads").to_pydict()
        assert list(zip(heads["layer"], heads["kv_head"], strict=True)) == [
            (0, 0),
            (0, 1),
            (1, 0),
            (1, 1),
        ]
        assert sum(heads["evictions"]) == result.evictions
        assert (result.evicted_at >= 0).sum() == result.evictions
    replay(trace, ["h2o:sinks=2"], ["25%"], when="step")
    assert trace.replays().num_rows == 2, "the same replay replaces its result"


def test_results_do_not_depend_on_what_else_is_replayed(synthetic_trace: SyntheticTrace) -> None:
    trace = synthetic_trace(steps=[80] + [1] * 40)
    names = [row["policy"] for row in replayable(trace) if row["replay"] != "no"]
    assert set(POLICIES) - set(names) == {
        *("criticalkv", "defensivekv", "expected_attention", "recorded", "kvzip"),
    }
    for when in ("step", "every=20"):
        together = replay(trace, names, ["10%", "25%", 30], when=when, store=False)
        for i, name in enumerate(names):
            alone = replay(trace, [name], ["25%"], when=when, store=False)[0]
            beside = together[3 * i + 1]
            found, wanted = alone.to_json(), beside.to_json()
            error = wanted.pop("output_error")
            assert found.pop("output_error") == pytest.approx(error, rel=1e-5)
            assert found == wanted
            assert alone.evicted_at.tobytes() == beside.evicted_at.tobytes()
            for mine, other in ((alone.steps, beside.steps), (alone.heads, beside.heads)):
                for column in set(mine) - {"output_error"}:
                    assert list(mine[column]) == list(other[column]), column


def test_kept_file(synthetic_trace: SyntheticTrace, tmp_path: Path) -> None:
    trace = synthetic_trace(steps=DECODED)
    file = tmp_path / "kept.json"
    args = ["replay", str(trace.path), "--policy", "streaming_llm:sinks=3", "--budget", "10"]
    assert main([*args, "--when", "prefill", "--no-store", "--kept", str(file)]) == 0
    kept = json.loads(file.read_text())
    want = [0, 1, 2, *range(33, 40)]
    assert kept == {"streaming_llm:sinks=3@10": {x: dict.fromkeys("01", want) for x in "01"}}
    assert main([*args, "--when", "step", "--no-store", "--kept", str(file)]) == 0
    kept = json.loads(file.read_text())
    assert kept["streaming_llm:sinks=3@10"]["1"]["0"] == [0, 1, 2, *range(58, 65)]
    assert trace.replays().num_rows == 0


def test_the_table_names_the_next_command(
    synthetic_trace: SyntheticTrace, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = synthetic_trace(steps=DECODED)
    args = ["replay", str(trace.path), "--policy", "streaming_llm", "--policy", "oracle"]
    assert main([*args, "--budget", "2"]) == 0
    out = capsys.readouterr().out
    assert f"kvtrace view {trace.path}" in out
    assert "4 protected tokens do not fit" in out
    assert "bound" in out


def test_a_percentage_that_loses_the_sinks_at_once_says_so(
    synthetic_trace: SyntheticTrace,
) -> None:
    trace = synthetic_trace(steps=DECODED)
    found = {}
    for when, budget in (("stream", "25%"), ("stream", "20"), ("step", "25%")):
        result = replay(trace, ["streaming_llm:sinks=8"], [budget], when=when)[0]
        found[when, budget] = result
    first = {key: one.kept()[0][0].tolist()[:8] == list(range(8)) for key, one in found.items()}
    noted = {key: any("its 8 sinks" in note for note in one.notes) for key, one in found.items()}
    assert first == {("stream", "25%"): False, ("stream", "20"): True, ("step", "25%"): True}
    assert noted == {key: not kept for key, kept in first.items()}


def test_without_decoded_tokens_rates_are_null(synthetic_trace: SyntheticTrace) -> None:
    trace = synthetic_trace(steps=[40])
    result = replay(trace, ["h2o"], [10], when="step")[0]
    assert result.to_json()["retained_mass"] is None
    assert result.to_json()["output_error"] is None
    assert result.measured_rows == result.hits == 0
    assert [len(p) for heads in result.kept().values() for p in heads.values()] == [10] * 4
    stream = replay(trace, ["h2o"], [10], when="stream")[0]
    assert stream.measured_rows == 39


def test_sliding_layers_never_hold_what_the_model_dropped(synthetic_trace: SyntheticTrace) -> None:
    specs = [
        LayerSpec(0, 4, 2, 16, 16, 0.25, attention_kind="sliding", sliding_window=16),
        LayerSpec(1, 4, 4, 8, 8, 0.3, softcap=3.0),
    ]
    trace = synthetic_trace(steps=DECODED, specs=specs)
    full, window = replay(trace, ["full", "sliding_window"], ["50%"], when="step")
    assert full.evictions == 0
    assert full.kept()[0][0].tolist() == list(range(50, 65))
    assert full.kept()[1][3].tolist() == list(range(65))
    assert window.kept()[0][0].tolist() == list(range(58, 65))
    assert full.retained_mass == pytest.approx(1, abs=1e-5)


def test_errors_are_one_line_and_misuse_exits_2(
    synthetic_trace: SyntheticTrace, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(synthetic_trace().path)
    for bad in (
        ["--policy", "h20", "--budget", "25%"],
        ["--policy", "h2o", "--budget", "0"],
        ["--policy", "h2o", "--budget", "4", "--when", "later"],
        ["--policy", "h2o", "--budget", "4", "--request", "7"],
        ["--policy", "h2o", "--budget", "4", "--kept", "/nowhere/x.json"],
    ):
        assert main(["replay", path, *bad]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
    assert main(["replay", path, "--policy", "h2o"]) == 2
    assert main(["replay", path, "--budget", "4"]) == 2


def test_a_trace_without_queries_is_refused_with_the_reason(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "e.kvtrace", source="synthetic", detail="events") as writer:
        model = writer.add_model(name="synthetic")
        writer.add_layers(model, [LayerSpec(0, 2, 1, 4, 4, 0.5)])
        writer.append("requests", {"request": [0], "run": [0], "model": [0], "prompt_tokens": [2]})
        writer.append("steps", {"step": [0], "model": [0]})
        columns = {"row": [0, 1], "step": [0, 0], "request": [0, 0], "position": [0, 1]}
        writer.append("rows", {**columns, "has_query": [False, False]})
        writer.append_layer(model, 0)
    trace = kvtrace.open(tmp_path / "e.kvtrace")
    with pytest.raises(InputError, match="the trace lacks k, q"):
        replay(trace, ["lru"], [1])
    assert {row["exactness"] for row in replayable(trace)} == {"no"}


def test_an_empty_trace_is_refused(tmp_path: Path) -> None:
    TraceWriter(tmp_path / "e.kvtrace", source="synthetic").close()
    with pytest.raises(InputError, match="holds no tokens"):
        replay(kvtrace.open(tmp_path / "e.kvtrace"), ["lru"], [1])


def test_replayable_lists_every_policy(synthetic_trace: SyntheticTrace) -> None:
    rows = replayable(synthetic_trace())
    assert [row["policy"] for row in rows] == list(POLICIES)
    assert {row["policy"]: row["exactness"] for row in rows}["streaming_llm"] == "E0"


def test_an_open_trace_is_replayed_as_far_as_it_has_come(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "open.kvtrace", source="synthetic", dtype="float32")
    write_synthetic(writer, [LayerSpec(0, 4, 2, 16, 16, 0.25)], [30, 1, 1])
    trace = kvtrace.open(tmp_path / "open.kvtrace")
    assert trace.status == "recording"
    result = replay(trace, ["lru"], ["50%"], when="step")[0]
    assert (result.tokens, result.measured_rows) == (32, 2)
    assert trace.replays()["replay"].to_pylist() == ["lru-50pct-step"]
    writer.close()


def test_without_values_output_error_is_null_and_policies_that_need_them_are_refused(
    tmp_path: Path,
) -> None:
    with TraceWriter(tmp_path / "qk.kvtrace", source="synthetic", detail="qk") as writer:
        write_synthetic(writer, [LayerSpec(0, 4, 2, 16, 16, 0.25)], DECODED)
    trace = kvtrace.open(tmp_path / "qk.kvtrace")
    result = replay(trace, ["h2o"], ["25%"], when="step")[0]
    assert result.to_json()["output_error"] is None
    assert result.retained_mass is not None
    with pytest.raises(InputError, match=r"lagkv cannot be replayed.*lacks v"):
        replay(trace, ["lagkv"], ["25%"])


def test_policies_can_be_listed(
    synthetic_trace: SyntheticTrace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", "--list", "--json"]) == 0
    rows = {row["policy"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(POLICIES) <= set(rows)
    assert rows["lagkv"]["needs"] == ["k", "v"]
    assert rows["criticalkv"]["needs"] == ["k", "q", "v", "wo"]
    assert "lag (tokens, default 128)" in rows["lagkv"]["parameters"]
    path = str(synthetic_trace().path)
    assert main(["replay", path, "--list", "--json"]) == 0
    rows = {row["policy"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["sliding_window"]["replay"] == "exactly"
    assert "output projections" in rows["criticalkv"]["reason"]
    assert main(["replay", path, "--list"]) == 0
    out = capsys.readouterr().out
    assert "streaming_llm" in out
    assert "Traceback" not in out


def test_what_is_not_given_is_misuse(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "--policy", "h2o"]) == 2
    assert "required: T, --budget" in capsys.readouterr().err


@dataclass(frozen=True, kw_only=True)
class Greedy(SnapKV):
    """A policy of the test: KV head 0 has a token more than its budget, and nobody less."""

    name: ClassVar[str] = "greedy"

    def limits(self, budget: Budget, rows: NDArray[np.int64], head: Head) -> NDArray[np.int64]:
        """One more."""
        return super().limits(budget, rows, head) + (head.kv_head == 0)


def test_a_result_without_a_bound_says_why(synthetic_trace: SyntheticTrace) -> None:
    trace = synthetic_trace(steps=DECODED)
    policies: list[str | Policy] = [Greedy(window=2), "snapkv:window=2"]
    greedy, plain = replay(trace, policies, ["4"], "step", store=False)
    assert (greedy.bound_scope, plain.bound_scope) == (None, "head")
    (note,) = greedy.notes
    assert "has no bound: its shares of the budget, together, are more than equal ones" in note
    assert not plain.notes


def test_the_best_reading_is_the_bound_of_what_chooses_per_query(
    synthetic_trace: SyntheticTrace, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(synthetic_trace(steps=DECODED).path)
    names = ["quest:page=2", "top_k", "h2o"]
    args = ["replay", path, "--when", "step", "--budget", "4", "--no-store"]
    args += [part for name in names for part in ("--policy", name)]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "what top_k retains (quest:page=2, top_k)" in " ".join(out.split())
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    bounds = {row[0]: (row[4], row[-1]) for row in cells if row}
    assert bounds["quest:page=2"][1] == bounds["top_k"][1] == bounds["top_k"][0]
    assert bounds["h2o"][1] == "-"


def test_every_policy_stands_under_the_bound_of_the_budgets_it_moves(
    synthetic_trace: SyntheticTrace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    table = tmp_path / "heads.json"
    table.write_text(json.dumps([[3, 0], [1, 1]]))
    named = {
        "h2o": "head",
        "adakv:window=4": "layer",
        "pyramidkv:window=4": "model",
        "cake:window=4": "model",
        f"headkv:table={table},window=4": "model",
        f"duo_attention:table={table},sinks=1,recent=2": "model",
        "adakv:base=pyramidkv,window=4": "model",
        "quest": "read",
        "top_k": "read",
        "full": None,
        "oracle": "head",
    }
    trace = synthetic_trace(steps=DECODED)
    args = ["replay", str(trace.path), "--when", "step"]
    args += [part for name in named for part in ("--policy", name)]
    args += ["--budget", "1", "--budget", "4", "--budget", "25%", "--budget", "60%"]
    assert main([*args, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["policy"]: row["bound_scope"] for row in found} == named
    columns = {"head": "bound", "layer": "bound_layer", "model": "bound_model"}
    bounds = {row["budget"]: row for row in found if "bound" in row}
    bounds_of: dict[str, dict[str | None, float]] = {
        budget: {scope: row[column] for scope, column in columns.items()}
        for budget, row in bounds.items()
    }
    for row in found:
        if row["policy"] == "top_k":
            bounds_of[row["budget"]]["read"] = row["retained_mass"]
    for row in found:
        own = bounds[row["budget"]]
        assert own["bound"] <= own["bound_layer"] + 1e-9
        assert own["bound_layer"] <= own["bound_model"] + 1e-9
        most = bounds_of[row["budget"]].get(row["bound_scope"], 1.0)
        assert row["retained_mass"] <= most + 1e-5, row["id"]
    compared = kvtrace.open(trace.path).sql("select policy, budget, bound from replay_compare")
    for row in compared.to_pylist():
        assert row["bound"] == bounds_of[row["budget"]].get(named[row["policy"]])
    own = {row["replay"]: row["own_bound"] for row in replay_rows(kvtrace.open(trace.path))}
    assert own == {row["id"]: bounds_of[row["budget"]].get(row["bound_scope"]) for row in found}


def test_which_bound_holds_for_whom_is_said(
    synthetic_trace: SyntheticTrace, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = synthetic_trace(steps=DECODED)
    args = ["replay", str(trace.path), "--policy", "h2o", "--policy", "adakv", "--budget", "25%"]
    assert main([*args, "--policy", "oracle"]) == 0
    assert "one budget for the heads of a layer (adakv)" in " ".join(
        capsys.readouterr().out.split()
    )
    assert main(args) == 0
    assert "bound:" not in capsys.readouterr().out
