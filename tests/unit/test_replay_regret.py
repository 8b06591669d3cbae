"""Regrets sum to the lost mass, and name the query that wanted what was evicted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import kvtrace
from kvtrace import Trace
from kvtrace.cli import main
from kvtrace.testing import SyntheticTrace
from kvtrace.writer import LayerSpec
from kvtrace_viewer.derived.wanted import query_wants, wanted_tokens
from kvtrace_viewer.replay import Result, replay
from kvtrace_viewer.replay.regret import (
    WANTS,
    compute_regrets,
    has_regrets,
    store_regrets,
    stored_evictions,
)

STEPS = [90] + [1] * 40
SPECS = [
    LayerSpec(0, 4, 2, 16, 16, 0.6),
    LayerSpec(1, 4, 2, 16, 16, 0.6, "sliding", sliding_window=50),
    LayerSpec(2, 4, 2, 16, 16, 0.6, softcap=4.0),
]
NEEDLE, ASKED = 17, 95


def lost_by_hand(trace: Trace, result: Result) -> tuple[dict[tuple[int, int, int], float], int]:
    """Regret by (layer, query head, token), and misses: from whole maps, in float64."""
    found: dict[tuple[int, int, int], float] = {}
    misses = 0
    for spec in trace.layers:
        for head in range(spec.num_q_heads):
            a = trace.attention(spec.layer, head).astype(np.float64)
            gone = result.evicted_at[:, spec.layer, head // spec.group_size]
            rows = np.arange(len(a))
            lost = (gone >= 0)[None, :] & (gone[None, :] < rows[:, None])
            regret = np.where(lost, a, 0).sum(axis=0)
            misses += int((lost & (a >= 1 / (rows[:, None] + 1))).sum())
            found |= {(spec.layer, head, int(j)): float(regret[j]) for j in np.flatnonzero(regret)}
    return found, misses


@pytest.mark.parametrize("when", ["prefill", "step", "stream"])
@pytest.mark.parametrize("policy", ["h2o", "streaming_llm", "random"])
def test_regrets_sum_to_the_lost_mass(
    synthetic_trace: SyntheticTrace, policy: str, when: str
) -> None:
    trace = synthetic_trace(STEPS, SPECS)
    full, result = replay(trace, ["full", policy], ["20%"], when=when, store=False)
    found = compute_regrets(trace, {"it": result.evicted_at})["it"]
    want, misses = lost_by_hand(trace, result)
    assert found.total == pytest.approx(sum(want.values()), rel=1e-6)
    have = {
        (int(layer), int(head), int(position)): float(regret)
        for part in found.regrets
        for layer, head, position, regret in zip(
            part["layer"], part["q_head"], part["position"], part["regret"], strict=True
        )
    }
    assert have == pytest.approx(want, rel=1e-5, abs=1e-9)
    assert sum(int(part["misses"].sum()) for part in found.regrets) == misses
    rows = result.measured_rows * sum(spec.num_q_heads for spec in SPECS)
    assert full.retained_mass is not None
    assert result.retained_mass is not None
    lost = (full.retained_mass - result.retained_mass) * rows
    # The engine sums masses in float32: the difference is good to their size.
    assert found.total == pytest.approx(lost, abs=1e-6 * rows)
    if when != "stream":  # under which the full cache is measured from the first row
        assert misses == result.misses


def test_the_wants_are_the_queries_that_pay_most(synthetic_trace: SyntheticTrace) -> None:
    trace = synthetic_trace(STEPS, SPECS)
    result = replay(trace, ["sliding_window"], ["30"], when="step", store=False)[0]
    found = compute_regrets(trace, {"it": result.evicted_at})["it"]
    rows = np.arange(trace.rows)
    for part in found.wants:
        layer, heads = int(part["layer"][0]), np.unique(part["q_head"])
        for head in heads:
            a = trace.attention(layer, int(head))
            gone = result.evicted_at[:, layer, int(head) // 2]
            wanted = np.where(gone[None, :] < rows[:, None], a, 0) * (gone >= 0)
            wanted[wanted < 1 / (rows[:, None] + 1)] = 0
            for token in np.unique(part["position"][part["q_head"] == head]):
                at = (part["q_head"] == head) & (part["position"] == token)
                best = np.argsort(-wanted[:, token], kind="stable")[:WANTS]
                best = best[wanted[best, token] > 0]
                np.testing.assert_array_equal(part["query"][at], best)
                np.testing.assert_allclose(part["attention"][at], a[best, token], rtol=1e-5)


def test_several_results_in_one_pass_are_what_each_is_alone(
    synthetic_trace: SyntheticTrace,
) -> None:
    trace = synthetic_trace(STEPS, SPECS)
    results = replay(trace, ["h2o", "full", "lru"], ["10%", "40"], when="step", store=False)
    together = compute_regrets(trace, {one.id: one.evicted_at for one in results})
    for one in results:
        alone = compute_regrets(trace, {one.id: one.evicted_at})[one.id]
        assert alone.total == together[one.id].total
        if one.policy == "full":
            assert alone.total == 0


def planted(folder: Path) -> Trace:
    """A synthetic trace in which query ASKED of query head 3 looks at key NEEDLE, and no other."""
    rng = np.random.default_rng(0)
    tokens, dim = 120, 16
    q = rng.normal(size=(4, tokens, dim)).astype(np.float32) * 0.1
    k = rng.normal(size=(2, tokens, dim)).astype(np.float32) * 0.1
    k[1, NEEDLE] = 0
    k[1, NEEDLE, 0] = q[3, ASKED, 0] = 8
    v = rng.normal(size=(2, tokens, dim)).astype(np.float32)
    ids = np.arange(tokens)
    np.savez(folder / "planted.npz", q0=q, k0=k, v0=v, ids=ids, prompt_tokens=64)
    out = folder / "planted.kvtrace"
    assert main(["import", "qkv-npz", str(folder / "planted.npz"), "--out", str(out)]) == 0
    return kvtrace.open(out)


def test_a_planted_needle_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = planted(tmp_path)
    capsys.readouterr()
    options = ["--policy", "sliding_window", "--policy", "full", "--budget", "25%", "--regret"]
    assert main(["replay", str(trace.path), *options, "--json"]) == 0
    window, full = json.loads(capsys.readouterr().out)
    assert full["regret"] == 0
    assert full["wanted"] == []
    first = window["wanted"][0]
    assert (first["position"], first["query"], first["q_head"]) == (NEEDLE, ASKED, 3)
    assert first["attention"] > 0.99
    assert window["regret"] == pytest.approx(
        trace.sql("select sum(regret) s from replay_regrets")["s"][0].as_py()
    )
    asked = query_wants(trace, window["id"], 0, NEEDLE)
    assert (asked[0]["query"], asked[0]["q_head"], asked[0]["kv_head"]) == (ASKED, 3, 1)
    assert main(["replay", str(trace.path), *options]) == 0
    shown = capsys.readouterr().out
    assert f"{NEEDLE} " in shown
    assert "nothing that was evicted was wanted later" in shown


def test_what_was_found_goes_with_its_replay(synthetic_trace: SyntheticTrace) -> None:
    trace = synthetic_trace(STEPS, SPECS)
    result = replay(trace, ["h2o"], ["20%"], when="step")[0]
    count = "select count(*) n from evicted_but_needed"
    assert trace.sql(count)["n"][0].as_py() == 0
    np.testing.assert_array_equal(stored_evictions(trace, result.id), result.evicted_at)
    found = compute_regrets(trace, {result.id: result.evicted_at})[result.id]
    assert not has_regrets(trace, result.id)
    store_regrets(trace, result.id, found)
    assert has_regrets(trace, result.id)
    kept = trace.sql("select * from evicted_but_needed order by attention desc").to_pylist()
    assert len(kept) == sum(len(part["position"]) for part in found.wants)
    assert kept[0]["text"] == f"t{kept[0]['position']}"
    assert kept[0]["query_text"] == f"t{kept[0]['query']}"
    assert trace.replays().num_rows == 1
    replay(trace, ["h2o"], ["20%"], when="step")
    assert not has_regrets(trace, result.id), "a new result has no old regrets"
    assert trace.sql(count)["n"][0].as_py() == 0


def test_the_view_is_there_while_the_trace_is_open(synthetic_trace: SyntheticTrace) -> None:
    trace = synthetic_trace(STEPS, SPECS)
    result = replay(trace, ["h2o"], ["20%"], when="step")[0]
    store_regrets(
        trace, result.id, compute_regrets(trace, {result.id: result.evicted_at})[result.id]
    )
    query = "select * from evicted_but_needed order by all"
    closed = trace.sql(query)
    assert closed.num_rows
    # A journal without its last line is that of a trace whose writer still runs, or died.
    journal = trace.path / "rank-00000" / "journal"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:-1]))
    copy = shutil.copytree(trace.path, trace.path.with_name("open.kvtrace"))
    opened = kvtrace.open(copy)
    assert opened.status != "complete"
    assert opened.sql(query).equals(closed)


def test_wanted_tokens_of_one_request(synthetic_trace: SyntheticTrace) -> None:
    trace = synthetic_trace(STEPS, SPECS)
    result = replay(trace, ["h2o"], ["20%"], when="step")[0]
    store_regrets(
        trace, result.id, compute_regrets(trace, {result.id: result.evicted_at})[result.id]
    )
    found = wanted_tokens(trace, result.id, count=3, request=0)
    assert len(found) == 3
    assert [row["regret"] for row in found] == sorted((r["regret"] for r in found), reverse=True)
    assert wanted_tokens(trace, result.id, request=1) == []


def test_regret_without_a_store_is_refused(
    synthetic_trace: SyntheticTrace, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = synthetic_trace()
    options = ["--policy", "h2o", "--budget", "25%", "--regret", "--no-store"]
    assert main(["replay", str(trace.path), *options]) == 1
    assert "--no-store" in capsys.readouterr().err
