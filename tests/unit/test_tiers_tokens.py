"""Token-level tiers: stalls to the nanosecond, and placements against whole attention maps."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvtrace import InputError, Trace
from kvtrace.cli import main
from kvtrace.testing import SyntheticTrace
from kvtrace.writer import LayerSpec
from kvtrace_viewer.replay import Result, replay
from kvtrace_viewer.tiers import Hardware, Options, Tier
from kvtrace_viewer.tiers.fetching import stalls, transfer_ns
from kvtrace_viewer.tiers.token_result import COLD, HOT, TokenResult
from kvtrace_viewer.tiers.tokens import place_tokens

STEPS = [90] + [1] * 40
SPECS = [
    LayerSpec(0, 4, 2, 16, 16, 0.6),
    LayerSpec(1, 4, 2, 16, 24, 0.6, "sliding", sliding_window=50),
    LayerSpec(2, 4, 4, 16, 16, 0.6, softcap=4.0),
]
#: Bytes of a slot of each layer: keys and values, 2 bytes a number.
SLOTS = (64, 80, 64)


def machine(read: float = 1e9, capacity: int = 10**9) -> Hardware:
    """A link of 1 ns a byte, after 50 ns."""
    return Hardware(
        "made up",
        (
            Tier("HBM", 10**9, 1e12, 1e12, 0, "made up"),
            Tier("DRAM", capacity, read, 1e9, 50e-9, "made up"),
        ),
    )


def placed(
    trace: Trace, policy: str, when: str = "step", **rules: str | bool
) -> tuple[TokenResult, Result]:
    [result] = replay(trace, [policy], ["20%"], when=when)
    options = Options(**rules)  # type: ignore[arg-type]
    return place_tokens(trace, result.id, machine(), options), result


def by_hand(trace: Trace, result: Result) -> dict[str, NDArray[np.float64]]:
    """By decoded row, from whole maps in float64: fetched bytes, and what is paid where."""
    tokens = trace.rows
    rows = np.arange(tokens)[:, None]
    names = ("bytes", "retained", "late", "lost", "hits", "misses")
    found = {name: np.zeros(tokens) for name in names}
    heads = 0
    for spec, size in zip(trace.layers, SLOTS, strict=True):
        for kv_head in range(spec.num_kv_heads):
            gone = result.evicted_at[:, spec.layer, kv_head]
            left = np.arange(tokens) + (spec.sliding_window or tokens + 1) - 1
            cold = ((gone >= 0) & (gone < left))[None, :] & (gone[None, :] < rows)
            group = range(kv_head * spec.group_size, (kv_head + 1) * spec.group_size)
            maps = [trace.attention(spec.layer, head).astype(np.float64) for head in group]
            needed = [(a >= 1 / (rows + 1)) & (np.arange(tokens) <= rows) for a in maps]
            fetched = cold & np.any(needed, axis=0)
            found["bytes"] += fetched.sum(axis=1) * size
            for a, need in zip(maps, needed, strict=True):
                found["retained"] += np.where(cold, 0, a).sum(axis=1)
                found["late"] += np.where(fetched, a, 0).sum(axis=1)
                found["lost"] += np.where(cold & ~fetched, a, 0).sum(axis=1)
                found["hits"] += (need & ~cold).sum(axis=1)
                found["misses"] += (need & cold).sum(axis=1)
                heads += 1
    for name in ("retained", "late", "lost"):
        found[name] /= heads
    return {name: values[STEPS[0] :] for name, values in found.items()}


@pytest.mark.parametrize(
    ("policy", "when"), [("h2o", "step"), ("h2o", "prefill"), ("streaming_llm", "step")]
)
def test_a_placement_is_what_whole_maps_say(
    synthetic_trace: SyntheticTrace, policy: str, when: str
) -> None:
    trace = synthetic_trace(STEPS, SPECS)
    found, result = placed(trace, policy, when)
    want = by_hand(trace, result)
    at = found.decodes
    assert at.tolist() == list(range(1, len(STEPS)))
    assert found.bytes_up[at].tolist() == want["bytes"].tolist()
    for name in ("retained", "late", "lost"):
        assert getattr(found, name)[at] == pytest.approx(want[name], rel=1e-5, abs=1e-8), name
    assert found.hits == want["hits"].sum() == result.hits
    assert found.misses == want["misses"].sum() == result.misses
    mean = found.mean(found.retained)
    assert mean == pytest.approx(result.retained_mass, abs=1e-6)


@pytest.mark.parametrize("mode", ["evict", "write-through"])
def test_bytes_are_conserved(synthetic_trace: SyntheticTrace, mode: str) -> None:
    trace = synthetic_trace(STEPS, SPECS)
    found, result = placed(trace, "h2o", mode=mode)
    sizes = np.array(
        [size * spec.num_kv_heads for size, spec in zip(SLOTS, SPECS, strict=True)], np.int64
    )
    # Of the layer with a window nothing is held that its queries do not see any more.
    made = np.arange(1, trace.rows + 1)
    seen = np.stack([made, np.minimum(made, 49), made], axis=1)[STEPS[0] - 1 :] @ sizes
    held = found.held
    slots = trace.rows * sizes.sum()
    if mode == "evict":
        # A slot goes down once, and is in one tier.
        assert found.moved_down.sum() == result.evictions
        assert held.sum(axis=1).tolist() == seen.tolist()
        assert (held[:, COLD] <= found.bytes_down.cumsum()).all()
    else:
        assert found.bytes_down.sum() == slots
        assert held[:, COLD].tolist() == seen.tolist()
        assert (held[:, HOT] <= held[:, COLD]).all()
    tokens = found.tokens[0]
    assert tokens.cold_slots.sum() == result.evictions
    assert tokens.fetches.sum() == found.fetched.sum()
    rows_and_heads = found.rows.sum() * sum(spec.num_q_heads for spec in SPECS)
    assert tokens.late_mass.sum() == pytest.approx((found.mean(found.late) or 0) * rows_and_heads)
    assert ((tokens.first_cold >= 0) == (tokens.cold_slots > 0)).all()


def test_stalls_worked_by_hand() -> None:
    # Three layers of 100 ns. The first waits for its fetch of 150; it computes from 150 to 250.
    # The second fetches nothing. The third's query is known at 350: fetched at 430, done at 530.
    fetch = np.array([[150, 0, 80]], np.int64)
    compute = np.array([300], np.int64)
    assert stalls(compute, fetch, False).tolist() == [230]
    # A layer ahead: asked for when the second begins, at 250, and there when it ends.
    assert stalls(compute, fetch, True).tolist() == [150]
    # The link is still busy with the second's 400 when the third asks.
    fetch = np.array([[0, 400, 80]], np.int64)
    # Second: asked at 0, there at 400, computes to 500; third: asked at 400, there at 480.
    assert stalls(compute, fetch, True).tolist() == [300]
    # Nothing of the division gets lost: 100 ns in three layers.
    assert stalls(np.array([100], np.int64), np.zeros((1, 3), np.int64), True).tolist() == [0]


def test_a_transfer_takes_its_latency_and_its_bytes() -> None:
    moved = np.array([0, 1, 1000], np.int64)
    assert transfer_ns(moved, 1e9, 50).tolist() == [0, 51, 1050]
    assert transfer_ns(moved, 3e9, 0).tolist() == [0, 1, 334]


steps = st.lists(
    st.tuples(st.integers(0, 1000), st.lists(st.integers(0, 500), min_size=3, max_size=3)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=200, deadline=None)
@given(steps, st.integers(0, 2), st.integers(0, 300))
def test_stalls_are_bounded_and_monotone(
    given_steps: list[tuple[int, list[int]]], layer: int, more: int
) -> None:
    compute = np.array([one for one, _ in given_steps], np.int64)
    fetch = np.array([of_layers for _, of_layers in given_steps], np.int64)
    waiting, ahead = stalls(compute, fetch, False), stalls(compute, fetch, True)
    # Nothing is hidden where each layer asks for its own; at most all but the first is, ahead.
    assert waiting.tolist() == fetch.sum(axis=1).tolist()
    assert (fetch[:, 0] <= ahead).all()
    assert (ahead <= waiting).all()
    slower = fetch.copy()
    slower[:, layer] += more
    assert (stalls(compute, slower, True) >= ahead).all()


def test_a_faster_link_stalls_no_longer(synthetic_trace: SyntheticTrace) -> None:
    trace = synthetic_trace(STEPS, SPECS)
    [result] = replay(trace, ["h2o"], ["20%"], when="step")
    slow, fast = (place_tokens(trace, result.id, machine(read)) for read in (1e8, 1e9))
    assert slow.bytes_up.tolist() == fast.bytes_up.tolist()
    assert (fast.stall_ns <= slow.stall_ns).all()
    assert slow.stall_ns.sum() > fast.stall_ns.sum() > 0


def test_what_does_not_fit_below_is_said(synthetic_trace: SyntheticTrace) -> None:
    trace = synthetic_trace(STEPS, SPECS)
    [result] = replay(trace, ["h2o"], ["20%"], when="step")
    assert "and has 10" in " ".join(place_tokens(trace, result.id, machine(capacity=10)).notes)
    with pytest.raises(InputError, match=r"'nothing' was not found in .*; one of h2o-20pct-step"):
        place_tokens(trace, "nothing", machine())


def test_the_command_keeps_what_it_finds(
    synthetic_trace: SyntheticTrace, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = synthetic_trace(STEPS, SPECS)
    [result] = replay(trace, ["h2o"], ["20%"], when="step")
    path = str(trace.path)
    assert main(["tiers", path, "--replay", result.id, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["misses"] == result.misses
    [kept] = trace.sql(
        "select r.late_mass, r.stall_ns, (select sum(bytes) from tier_transfers"
        " where direction = 'up' and tier_run = r.tier_run) as moved,"
        " (select sum(stall_ns) from tier_steps where tier_run = r.tier_run) as stalled,"
        " (select sum(fetches) from tier_tokens where tier_run = r.tier_run) as fetches"
        f" from tier_runs r where tier_run = '{found['id']}'"
    ).to_pylist()
    assert kept["late_mass"] == found["late_mass"]
    assert kept["moved"] == found["tiers"][COLD]["bytes_up"]
    assert kept["stalled"] == kept["stall_ns"] == round(found["stall_s"]["total"] * 1e9)
    assert kept["fetches"] == found["fetched_slots"]
    assert main(["tiers", path, "--replay", result.id]) == 0
    assert "served late" in " ".join(capsys.readouterr().out.split())
    # A damaged one is put aside, and the rest of the trace is as it was.
    damaged = next((trace.path / "whatifs" / found["id"] / "tables" / "tier_runs").iterdir())
    damaged.write_bytes(b"nothing")
    assert main(["check", path]) != 0
    assert main(["check", path, "--repair"]) == 0
    assert not trace.sql("select * from tier_runs").num_rows
    assert trace.replays()["replay"].to_pylist() == [result.id]
