"""Derived tables of a trace that grows: only what came since is computed, and nothing else differs.

The keys and queries are synthetic: seeded random numbers.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import kvtrace
from kvtrace import database, derived, derived_heads, derived_parts
from kvtrace.sql import derive
from kvtrace.testing import write_synthetic
from kvtrace.writer import LayerSpec, TraceWriter

#: A scale of 1.5 makes random attention peaked enough to have sinks: synthetic.
SPECS = [
    LayerSpec(0, 4, 2, 8, 8, 1.5),
    LayerSpec(1, 4, 2, 8, 8, 1.5, attention_kind="sliding", sliding_window=20),
    LayerSpec(2, 4, 2, 8, 8, 1.5, attention_kind="bidirectional"),
]


class Growing:
    """A trace that is being written: requests that come, grow and are cut."""

    def __init__(self, path: Path, specs: list[LayerSpec]) -> None:
        self.writer = TraceWriter(path, source="synthetic", dtype="float32")
        self.specs = specs
        self.model = self.writer.add_model(name="x", architecture="none", num_layers=len(specs))
        self.writer.add_layers(self.model, specs)
        self.tokens: dict[int, int] = {}
        self.rows = self.steps = 0
        self.rng = np.random.default_rng(0)

    def grow(self, request: int, count: int) -> None:
        """Process tokens of a request; a new one begins with them as its prompt."""
        start = self.tokens.get(request, 0)
        if not start:
            columns = {"request": [request], "run": [0], "model": [self.model]}
            self.writer.append("requests", {**columns, "prompt_tokens": [count]})
        positions = np.arange(start, start + count, dtype=np.int32)
        rows = np.arange(self.rows, self.rows + count)
        # One query in five was not kept.
        has_query = self.rng.random(count) > 0.2
        has_query[0] = True
        owner = np.full(count, request)
        self.writer.append("steps", {"step": [self.steps], "model": [self.model], "phase": ["x"]})
        self.writer.append(
            "rows",
            {
                "row": rows,
                "step": np.full(count, self.steps),
                "request": owner,
                "position": positions,
                "has_query": has_query,
            },
        )
        self.writer.append(
            "tokens",
            {"request": owner, "position": positions, "text": [f"t{n}" for n in rows], "row": rows},
        )
        for spec in self.specs:
            self._arrays(spec, count, has_query)
        self.tokens[request] = start + count
        self.rows += count
        self.steps += 1

    def _arrays(self, spec: LayerSpec, count: int, has_query: Any) -> None:
        q = self.rng.normal(size=(count, spec.num_q_heads, spec.head_dim)).astype(np.float32)
        lse = self.rng.normal(6, 1, size=(count, spec.num_q_heads)).astype(np.float32)
        k, v = self.rng.normal(size=(2, count, spec.num_kv_heads, spec.head_dim))
        self.writer.append_layer(
            self.model, spec.layer, q=q[has_query], k=k, v=v, lse=lse[has_query]
        )

    def crop(self, request: int, tokens: int) -> None:
        """Forget all but a request's first tokens."""
        columns = {"row": [self.rows], "request": [request], "source": [request]}
        self.writer.append("forks", {**columns, "tokens": [tokens]})
        self.tokens[request] = tokens


def derived_tables(path: Path) -> dict[str, pa.Table]:
    """All of them, in one order."""
    _, state = derive(kvtrace.open(path))
    with duckdb.connect() as connection:
        return {
            name: connection.sql(f"from ({select}) order by all").to_arrow_table()
            for name, select in (derived.scans(path, state.commits) or {}).items()
        }


kinds = st.sampled_from(["grow", "grow", "grow", "crop"])
steps = st.lists(st.tuples(kinds, st.integers(0, 3), st.integers(1, 70)), min_size=1, max_size=6)


@given(commits=st.lists(steps, min_size=1, max_size=3), first=st.integers(1, 400))
@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.generate])
def test_incremental_is_whole_to_the_last_bit(
    commits: list[list[tuple[str, int, int]]], first: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trace = Growing(Path(folder) / "live.kvtrace", SPECS)
        path = trace.writer.path
        trace.grow(0, first)
        for commit in [[], *commits]:
            for what, request, count in commit:
                if what == "grow":
                    trace.grow(request, count)
                elif count < trace.tokens.get(request, 0):
                    trace.crop(request, count)
            trace.writer.commit()
            found = derived_tables(path)
            # Aside meanwhile, so that what the next commit goes on from has gone on itself.
            (path / "cache").rename(path / "kept")
            whole = derived_tables(path)
            shutil.rmtree(path / "cache")
            (path / "kept").rename(path / "cache")
            assert found == whole
            assert whole["key_attention"].num_rows == 12 * sum(trace.tokens.values())
        trace.writer.close()
        assert derived_tables(path)["request_tokens"].num_rows == sum(trace.tokens.values())


def test_only_what_came_since_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Growing(tmp_path / "live.kvtrace", SPECS[:2])
    trace.grow(0, 300)
    trace.grow(1, 300)
    trace.writer.commit()
    derived_tables(trace.writer.path)
    trace.grow(1, 5)
    trace.grow(2, 10)
    trace.writer.commit()
    asked: list[tuple[int, int]] = []
    read = kvtrace.Trace.attention_data

    def watched(self: kvtrace.Trace, layer: int, request: int = 0, skipped: int = 0) -> Any:
        found = read(self, layer, request, skipped)
        asked.append((request, skipped))
        return found

    monkeypatch.setattr(kvtrace.Trace, "attention_data", watched)
    derived_tables(trace.writer.path)
    assert {request for request, _ in asked} == {1, 2}
    # About 240 of 300 queries were kept: all but the last block of 64 are in the sums.
    assert {skipped for request, skipped in asked if request == 1} <= {128, 192, 256}
    trace.writer.close()


def test_parts_stay_few_and_old_ones_go(tmp_path: Path) -> None:
    trace = Growing(tmp_path / "live.kvtrace", SPECS[:1])
    for request in range(12):
        trace.grow(request, 3)
        trace.writer.commit()
        assert derived_tables(trace.writer.path)["request_tokens"].num_rows == 3 * (request + 1)
    folder = trace.writer.path / derived_parts.DIRECTORY
    parts = derived_parts.read_made(folder).parts
    assert len(parts) <= 4
    assert sorted(x.name for x in folder.iterdir() if x.is_dir()) == sorted(x.name for x in parts)
    trace.writer.close()


def test_a_reader_keeps_the_tables_of_its_commit(tmp_path: Path) -> None:
    trace = Growing(tmp_path / "live.kvtrace", SPECS[:1])
    trace.grow(0, 100)
    trace.writer.commit()
    path = trace.writer.path
    derived_tables(path)
    with derived_parts.held(path):
        before = database.State(path).commits
        scans = derived.scans(path, before)
        assert scans
        trace.grow(0, 50)
        trace.writer.commit()
        assert derived_tables(path)["request_tokens"].num_rows == 150
        # Those of the older commit are found no more, but who has found them reads them to the end.
        assert derived.scans(path, before) is None
        file = scans["request_tokens"].split("'")[1]
        assert pq.read_table(file).num_rows == 100
    trace.writer.close()


def test_a_state_that_was_altered_is_not_believed(tmp_path: Path) -> None:
    trace = Growing(tmp_path / "live.kvtrace", SPECS[:1])
    trace.grow(0, 10)
    trace.writer.commit()
    path = trace.writer.path
    derived_tables(path)
    made_from = path / derived_parts.DIRECTORY / "made_from.json"
    # Else request 0 would be left out of what the part stands for.
    text = made_from.read_text()
    assert '"outdated": []' in text
    made_from.write_text(text.replace('"outdated": []', '"outdated": [0]'))
    assert derived_tables(path)["request_tokens"].num_rows == 10
    trace.writer.close()


def test_tables_of_one_query_are_of_one_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A commit between computing them and reading them made all of them empty.
    trace = Growing(tmp_path / "live.kvtrace", SPECS[:1])
    trace.grow(0, 100)
    trace.writer.commit()
    write = derived_heads.write_heads

    def commit_meanwhile(*arguments: Any) -> Any:
        trace.grow(0, 10)
        trace.writer.commit()
        return write(*arguments)

    monkeypatch.setattr(derived, "write_heads", commit_meanwhile)
    counts = "select (select count(*) from rows), (select count(*) from request_tokens)"
    found = kvtrace.open(trace.writer.path).sql(counts).to_pylist()
    assert [*found[0].values()] == [100, 100]
    trace.writer.close()


def test_who_asks_at_once_is_answered_by_one_computation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TraceWriter(tmp_path / "x.kvtrace", source="synthetic") as writer:
        write_synthetic(writer, SPECS[:1], [50])
    made: list[int] = []
    make = derived_heads.write_heads

    def counted(*arguments: Any) -> Any:
        made.append(1)
        return make(*arguments)

    monkeypatch.setattr(derived, "write_heads", counted)
    found: list[Any] = []

    def ask() -> None:
        trace = kvtrace.open(writer.path)
        found.append(trace.sql("select count(*) as n from key_attention").to_pylist())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[{"n": 200}]] * 4
    assert len(made) == 1
