"""Decoding behind the prompts: schedules worked by hand, and what holds for any workload."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvtrace
from kvtrace.cli import main
from kvtrace_viewer.derived.tiers import residency, series, tier_runs
from kvtrace_viewer.tiers import read_hardware
from kvtrace_viewer.tiers.decode import Batches, DecodePace, Stretches, l2_reuse, serve_batches

#: A step streams the weights in 100 ns and each token of the batch in 1.
PACE = DecodePace(weights_ns=100, token_ns=1, compute_ns=0)

Request = tuple[int, int, int, int]


def serve(
    requests: list[Request], max_batch: int, capacity: int = 1000, pace: DecodePace = PACE
) -> Batches:
    """Requests as (arrival, service, prompt tokens, output tokens), in blocks of 4."""
    arrival, service, prompt, output = (
        np.array(column, np.int64) for column in zip(*requests, strict=True)
    )
    needs = -(-(prompt + output) // 4)
    return serve_batches(arrival, service, prompt, output, needs, capacity, max_batch, pace)


def rows(found: Batches) -> list[tuple[int, ...]]:
    return [tuple(map(int, row)) for row in zip(*found.stretches, strict=True)]


TWO: list[Request] = [(0, 50, 10, 3), (0, 30, 5, 2)]


def test_a_batch_worked_by_hand() -> None:
    found = serve(TWO, max_batch=2)
    # Prompts to 50 and to 80; then both decode: 100 + 11 + 6 tokens. The second is done, and the
    # first's last step streams 12.
    assert found.first_ns.tolist() == [50, 80]
    assert found.finish_ns.tolist() == [80 + 117 + 112, 80 + 117]
    assert rows(found) == [(80, 117, 1, 2, 17), (197, 112, 1, 1, 12)]


def test_one_at_a_time_worked_by_hand() -> None:
    found = serve(TWO, max_batch=1)
    # The second's prompt waits for the first's two steps, of 11 and 12 tokens.
    assert found.first_ns.tolist() == [50, 50 + 111 + 112 + 30]
    assert found.finish_ns.tolist() == [273, 303 + 106]
    assert rows(found) == [(50, 223, 2, 1, 11), (303, 106, 1, 1, 6)]


def test_what_does_not_fit_waits_and_what_never_fits_is_refused() -> None:
    # Blocks of 4: the first takes 4, the second 2, the third 5.
    found = serve([*TWO, (0, 1, 18, 1)], max_batch=8, capacity=4)
    assert found.first_ns.tolist() == [50, 303, -1]
    assert found.to_json()["refused"] == 1


def test_a_prompt_that_comes_while_others_decode_goes_before_the_next_step() -> None:
    found = serve([(0, 50, 10, 4), (170, 30, 5, 1)], max_batch=2)
    # Steps end at 161 and 273; the prompt takes until 303, then the last step of 13 tokens.
    assert found.first_ns.tolist() == [50, 303]
    assert found.finish_ns.tolist() == [303 + 113, 303]


def test_a_step_takes_what_it_computes_where_that_is_longer() -> None:
    found = serve(TWO, max_batch=2, pace=PACE._replace(compute_ns=200))
    assert found.finish_ns.tolist() == [80 + 400 + 200, 80 + 400]
    recorded = serve(TWO, max_batch=2, pace=PACE._replace(step_ns=7))
    assert recorded.finish_ns.tolist() == [80 + 14, 80 + 7]


requests = st.lists(
    st.tuples(st.integers(0, 2000), st.integers(1, 300), st.integers(1, 40), st.integers(0, 12)),
    min_size=1,
    max_size=12,
).map(sorted)


@settings(max_examples=150, deadline=None)
@given(requests, st.integers(1, 5), st.integers(14, 40))
def test_tokens_are_conserved(given_: list[Request], max_batch: int, capacity: int) -> None:
    found = serve(given_, max_batch, capacity)
    arrival, service, _prompt, output = np.array(given_, np.int64).T
    steps, batch = found.stretches.steps, found.stretches.batch
    assert (steps * batch).sum() == np.maximum(output - 1, 0).sum()
    assert (batch <= max_batch).all()
    # At most what fits is there at once, and prompts keep their order.
    assert (found.stretches.context <= 4 * capacity).all()
    assert (np.diff(found.first_ns) >= service[1:]).all()
    assert (found.first_ns >= arrival + service).all()
    assert (found.finish_ns >= found.first_ns).all()
    # Time is spent on prompts, on steps, or on waiting for the first to come.
    busy = service.sum() + found.stretches.time_ns.sum()
    assert found.finish_ns.max() >= busy
    alone = serve(given_, 1, capacity)
    faster = serve(given_, 1, capacity, PACE._replace(token_ns=0.5))
    assert (faster.finish_ns <= alone.finish_ns).all()


def test_the_l2_serves_all_of_what_fits_and_else_its_share() -> None:
    hardware = read_hardware("h100")
    one = np.ones(1, np.int64)

    def reuse(context: int) -> dict[str, float]:
        found = l2_reuse(
            Stretches(0 * one, one, one, one, context * one), hardware, 1000, 10**7, layers=4
        )
        assert found is not None
        return found

    # 10 MB of weights and 20 MB of cache fit into 50; with 90 MB of cache half of it can stay.
    assert reuse(20_000)["most_from_l2"] == 1.0
    assert reuse(90_000)["most_from_l2"] == 0.5
    assert reuse(90_000)["steps_whose_layer_fits"] == 1.0
    assert reuse(300_000)["steps_whose_layer_fits"] == 0.0
    assert l2_reuse(serve(TWO, 1).stretches, read_hardware("h200"), 1, 1, 1) is None


def test_the_command_decodes_an_imported_workload(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "mooncake.jsonl"
    lines = [
        {"timestamp": n, "input_length": 1024, "output_length": 20, "hash_ids": [0, n]}
        for n in range(1, 9)
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = str(tmp_path / "load.kvtrace")
    assert main(["import", "mooncake", str(source), "--out", path]) == 0
    capsys.readouterr()
    assert main(["tiers", path, "--max-batch", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["decode"]
    assert found["ttft_s"]["mean"] > 0
    assert 1 < found["mean_batch"] <= 4
    kept = kvtrace.open(path).sql(
        "select sum(tokens) as tokens from tier_steps where phase = 'decode'"
    )
    assert kept["tokens"].to_pylist() == [8 * 19]
    # The page's series have the steps where they stand in time.
    [run] = tier_runs(kvtrace.open(path))
    shown = series(kvtrace.open(path), run["tier_run"])
    assert len(shown.compute) == len(shown.seconds) == 8
    assert shown.compute.sum() == pytest.approx(run["compute_ns"] / 1e9 + found["decode_s"])
    assert residency(kvtrace.open(path), run["tier_run"]).counts[:, -1, 0].sum() == 9
    assert main(["tiers", path, "--max-batch", "4"]) == 0
    assert "L2 of" in capsys.readouterr().out
    assert main(["tiers", path, "--max-batch", "-1"]) == 1
