"""What-if with the recorded settings is the recorded run, block by block."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.support.batching import build, generate, prompts

import kvtrace
import kvtrace.cli
from kvtrace.block_tables import block_tables
from kvtrace_recorder import record
from kvtrace_viewer.allocation import observe, occupancy, sweep
from kvtrace_viewer.commands import allocation

pytestmark = pytest.mark.usefixtures("one_thread", "writer_thread")

RUNS = {
    "pressed": (prompts(18, 15, 17, 16), {"new": 14, "num_blocks": 20}),
    "shared": (prompts(30, 33, 29, 41, 26, 37, shared=16), {"new": 12, "num_blocks": 34}),
    "in parts": (
        prompts(60, 13, 55, 21, 70, 18, 44, 10, 25),
        {"new": 20, "num_blocks": 40, "max_batch_tokens": 32},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_recorded_settings_give_the_recorded_block_tables(name: str, tmp_path: Path) -> None:
    model = build()
    inputs, options = RUNS[name]
    with record(model, tmp_path / "a.kvtrace", detail="events", strict=True):
        generate(model, inputs, **options)

    trace = kvtrace.open(tmp_path / "a.kvtrace")
    recorded, simulated = observe(trace), sweep(trace, {})[0]
    assert sum(job.preemptions for job in simulated.run.jobs) > 0
    assert simulated.history.steps == recorded.steps
    for moment in range(recorded.steps + 1):
        assert simulated.history.tables_at(moment) == recorded.tables_at(moment)
    found, expected = occupancy(simulated.history), occupancy(recorded)
    for column in vars(expected):
        assert np.array_equal(getattr(found, column), getattr(expected, column)), column
    # Numbers of blocks are the trace's, less the first.
    tables = {
        request: [block + recorded.first_block for block in blocks]
        for request, blocks in recorded.tables_at(5).items()
    }
    assert tables == {key[0]: blocks for key, blocks in block_tables(trace, step=5).items()}


def test_the_verb_sweeps_and_keeps_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, path = build(), tmp_path / "a.kvtrace"
    with record(model, path, detail="events", strict=True):
        generate(model, prompts(18, 15, 17, 16), new=14, num_blocks=20)
    given = [str(path), "--pool", "7,20,64", "--policy", "all,lru", "--json"]
    assert kvtrace.cli.main(["allocation", *given]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["kind"] for one in found] == ["recorded"] + ["what-if"] * 6
    recorded, same = found[0], found[3]
    assert same["settings"]["pool"] == recorded["pool"] == 20
    for number in ("preemptions", "evictions", "steps", "peak_blocks"):
        assert same[number] == recorded[number]
    for number in ("wait_steps_mean", "wait_steps_p95", "preempted_steps_mean"):
        assert same[number] == recorded[number]
    assert all("the pool has 7" in reason for reason in found[1]["refused"])
    assert found[1]["refused"]
    assert found[5]["preemptions"] == 0
    rows = kvtrace.open(path).sql(
        "select r.allocation_run, any_value(preemptions) p, sum(held) held from allocation_runs r"
        " join allocation_steps using (allocation_run) group by 1 order by 1"
    )
    assert rows.num_rows == 7
    assert min(rows["held"].to_pylist()) > 0


def test_what_cannot_be_asked_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert allocation.__doc__ is not None
    model, path = build("GptOss", "eager"), tmp_path / "a.kvtrace"
    with record(model, path, detail="events", strict=True):
        generate(model, prompts(9, 8), new=3)
    assert kvtrace.cli.main(["allocation", str(path)]) == 0
    assert kvtrace.cli.main(["allocation", str(path), "--pool", "9"]) == 1
    assert "2 groups of layers" in capsys.readouterr().err
    assert kvtrace.cli.main(["allocation", str(path), "--pool", "many"]) == 1
    assert "'many' is no number" in capsys.readouterr().err
