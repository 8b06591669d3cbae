"""Requests of continuous batching that begin with the rows of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.batching import (
    PAGE,
    Snapshots,
    answers,
    batching,
    build,
    check_attention,
    check_sequences,
    check_tables,
    events,
    generate,
    names,
    prompts,
    sampling,
)

import kvtrace
from kvtrace.writer import TraceWriter
from kvtrace_recorder import histories, pipeline, record

pytestmark = pytest.mark.usefixtures("one_thread", "batching_restored", "writer_thread")


def test_a_shared_prefix_begins_with_the_rows_of_the_request_that_computed_it(
    snapshots: Snapshots, tmp_path: Path
) -> None:
    model, inputs = build(), prompts(23, 19, 22, shared=18)

    def run() -> dict[str, Any]:
        config = batching(return_logprobs=True)
        with model.continuous_batching_context_manager(
            generation_config=sampling(), continuous_batching_config=config
        ) as manager:
            found = {}
            for ids in inputs:
                # One after the other: the later ones find the blocks of the first in the cache.
                name = manager.add_request(ids, eos_token_id=-1)
                found[name] = manager.get_result(name, timeout=200)
        return found

    plain = run()
    snapshots.clear()
    with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording:
        recorded = run()

    assert answers(recorded) == answers(plain)
    assert recording.gaps == {}
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    check_sequences(trace, recorded)
    check_attention(trace, model)
    check_tables(trace, snapshots)
    forks = trace.table("forks").to_pylist()
    # 18 tokens are four full pages.
    assert [(f["source"], f["tokens"]) for f in forks] == [(0, 16), (0, 16)]
    assert [e["block_index"] for e in events(trace, "share")] == [0, 1, 2, 3] * 2
    processed = trace.table("rows")["position"].to_pylist()
    assert processed.count(15) == 1
    assert processed.count(16) == 3


def test_the_keys_of_an_ended_request_are_read_back_where_another_begins_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    read_back = TraceWriter.read_back

    def counted(self: Any, kind: str, model: int, rows: Any) -> Any:
        read.append(len(rows))
        return read_back(self, kind, model, rows)

    def refused(*args: Any, **kwargs: Any) -> None:
        raise OSError("no process, so that the writer runs in this one")

    monkeypatch.setattr(pipeline, "WriterProcess", refused)
    monkeypatch.setattr(histories, "DORMANT_BYTES", 0)
    monkeypatch.setattr(TraceWriter, "read_back", counted)
    model, results = build(), {}
    with (
        record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording,
        model.continuous_batching_context_manager(
            generation_config=sampling(), continuous_batching_config=batching()
        ) as manager,
    ):
        for ids in prompts(23, 19, 22, shared=18):
            name = manager.add_request(ids, eos_token_id=-1)
            results[name] = manager.get_result(name, timeout=200)

    assert recording.gaps == {}
    assert read == [16, 16]
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    check_sequences(trace, results)
    check_attention(trace, model)


def test_what_keys_received_is_summed_over_the_parts_of_a_prompt(tmp_path: Path) -> None:
    """Prompts longer than a batch are processed in parts, which see the earlier parts' keys."""
    model, inputs = build("GptOss", "eager"), prompts(40, 21, 60)
    traces = []
    runs: dict[str, dict[str, Any]] = {"full": {}, "less": {"queries": "last=5"}}
    for name, options in runs.items():
        path = tmp_path / f"{name}.kvtrace"
        with record(model, path, dtype="float32", strict=True, **options) as recording:
            generate(model, inputs, max_batch_tokens=32)
        assert recording.gaps == {}
        traces.append(kvtrace.open(path))
    full, less = traces
    by_name = {name: number for number, name in names(less).items()}
    for number, name in names(full).items():
        (request,) = (r for r in full.requests() if r.request == number)
        part = slice(0, request.prompt_tokens)
        for spec in full.layers:
            maps = [full.attention(spec.layer, h, part, part, number) for h in range(4)]
            expected = np.stack([one.sum(axis=0) for one in maps], axis=1)
            found = less.row_array("received", spec.layer, by_name[name])[part]
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_a_shared_prefix_received_is_a_gap(tmp_path: Path) -> None:
    model, inputs = build(), prompts(23, 19, shared=18)
    with (
        record(model, tmp_path / "a.kvtrace", queries="last=2", strict=True) as recording,
        model.continuous_batching_context_manager(
            generation_config=sampling(), continuous_batching_config=batching()
        ) as manager,
    ):
        for ids in inputs:
            name = manager.add_request(ids, eos_token_id=-1)
            assert manager.get_result(name, timeout=200) is not None
    ((reason, count),) = recording.gaps.items()
    assert "were another's" in reason
    assert count == 1
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert np.isnan(trace.row_array("received", 0, 1)[16:19]).all()


@pytest.mark.writer_process
def test_the_children_of_a_request_begin_with_its_rows(
    snapshots: Snapshots, tmp_path: Path
) -> None:
    model, inputs = build(), prompts(18, 11)
    plain = generate(model, inputs, children=2, seed=3)
    snapshots.clear()
    with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording:
        recorded = generate(model, inputs, children=2, seed=3)

    assert answers(recorded) == answers(plain)
    assert recording.gaps == {}
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert len(names(trace)) == 6
    check_sequences(trace, recorded)
    check_attention(trace, model)
    check_tables(trace, snapshots)
    # The pages that a parent has filled are shared, the last one is copied.
    assert len(events(trace, "fork")) == 2 * 2
    assert {e["bytes"] for e in events(trace, "fork")} == {PAGE * 2 * 2 * 2 * 12 * 4}
