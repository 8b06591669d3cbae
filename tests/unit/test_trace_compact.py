"""A compacted trace is the same trace, to those who open it and to those who had it open."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvtrace
from kvtrace import compact as compact_module
from kvtrace import database, tables
from kvtrace.cli import main
from kvtrace.compact import compact, exchange
from kvtrace.errors import TraceError
from kvtrace.layout import ARRAYS
from kvtrace.testing import write_synthetic
from kvtrace.writer import LayerSpec, TraceWriter
from kvtrace_viewer.replay import replay

SPECS = [LayerSpec(layer, 4, 2, 8, 8, 8**-0.5) for layer in range(2)]
STEPS = [40] + [1] * 12


def written(path: Path, *, ended: bool, rank: int = 0) -> TraceWriter:
    """A trace of many commits; of a recorder that died where it has not `ended`."""
    writer = TraceWriter(path, source="synthetic", rank=rank, launch="one")
    write_synthetic(writer, SPECS, STEPS)
    writer.add_received(0, 1, np.arange(5, 9), np.full((4, 4), 0.5, np.float32))
    writer.put_static("wo", np.ones((2, 3, 4), np.float32), "layer,hidden,head")
    writer.commit()
    if ended:
        writer.close()
    else:
        # What the death of a process does: its lock is gone.
        writer._store._journal.close()
    return writer


def everything(trace: kvtrace.Trace) -> dict[str, Any]:
    """All that a reader can see."""
    found: dict[str, Any] = {name: trace.table(name).to_pylist() for name in tables.arrow_schemas()}
    for request in trace.requests():
        number = request.request
        for layer in range(2):
            data = trace.layer_data(layer, number)
            for kind in ("q", "k", "v", "lse", "received"):
                array = getattr(data, kind)
                found[f"{kind} {layer} {number}"] = None if array is None else array.tobytes()
        found[f"attention {number}"] = trace.attention(1, 2, request=number).tobytes()
        found[f"wo {number}"] = trace.static("wo", number).tobytes()
    return found | {"status": trace.status, "rows": trace.rows, "ranks": trace.ranks}


@pytest.mark.parametrize("ended", [True, False])
def test_it_is_the_same_in_large_pieces(
    tmp_path: Path, ended: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.kvtrace"
    written(path, ended=ended)
    written(path, ended=True, rank=3)
    # A closed rank of one commit is left alone.
    with TraceWriter(path, source="synthetic", rank=7, launch="one") as writer:
        writer.add_model(name="synthetic")
    opened = kvtrace.open(path)
    replay(opened, ["h2o"], ["50%"])
    before = everything(opened)
    untouched = (path / "rank-00007/journal").stat().st_ino
    found = compact(kvtrace.open(path))
    assert found.ranks == [0, 3]
    assert found.segments[0] > 80
    assert found.segments[1] == sum(
        len(files)
        for rank in (0, 3)
        for files in kvtrace.open(path).store(rank).state.segments.values()
    )
    for reader in (opened, kvtrace.open(path)):
        assert everything(reader) == before
    for rank in (0, 3):
        store = kvtrace.open(path).store(rank)
        assert store.closed
        assert not list((store.directory / ARRAYS).glob("*.tail"))
        assert {len(files) for files in store.state.segments.values()} == {1}
    assert (path / "rank-00007/journal").stat().st_ino == untouched
    assert main(["check", str(path)]) == (0 if ended else 3)
    capsys.readouterr()
    # Once more: nothing to do.
    assert main(["compact", str(path)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert [x.name for x in path.iterdir() if x.name.startswith(".")] == []


def test_readers_see_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    """Traces that are open in every state of reading, while they are compacted."""
    for number in range(4):
        path = tmp_path / f"{number}.kvtrace"
        written(path, ended=number % 2 == 0)
        expected = everything(kvtrace.open(path))
        stop = threading.Event()
        wrong: list[Any] = []

        def follow(path: Path, expected: dict[str, Any], stop: Any, wrong: list[Any]) -> None:
            trace, rounds = kvtrace.open(path), 0
            while not stop.is_set() or rounds < 3:
                rounds += 1
                try:
                    # Old readers go on; new ones come.
                    for one in (trace, kvtrace.open(path)):
                        found = everything(one)
                        wrong += [key for key in expected if found[key] != expected[key]]
                    count = trace.sql("select count(*) n from tokens")["n"][0].as_py()
                    wrong += [] if count == sum(STEPS) else [count]
                except Exception as error:
                    wrong.append(error)
                    raise

        reader = threading.Thread(target=follow, args=(path, expected, stop, wrong))
        reader.start()
        try:
            compact(kvtrace.open(path))
        finally:
            stop.set()
            reader.join()
        assert wrong == []


@pytest.mark.parametrize("before", ["create_views", "tables.views"])
def test_a_query_goes_on_in_the_new_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """Compacted after the state was read, or after the names of its files were."""
    path = tmp_path / "t.kvtrace"
    written(path, ended=False)
    trace = kvtrace.open(path)
    place, name = (database, before) if before == "create_views" else (tables, "views")
    given = getattr(place, name)

    def late(*arguments: Any) -> Any:
        monkeypatch.undo()
        compact(kvtrace.open(path))
        return given(*arguments)

    monkeypatch.setattr(place, name, late)
    assert trace.sql("select count(*) n from tokens")["n"].to_pylist() == [sum(STEPS)]


def test_what_fails_leaves_it_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.kvtrace"
    written(path, ended=False)
    expected = everything(kvtrace.open(path))

    def full(*_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compact_module, "exchange", full)
    with pytest.raises(TraceError, match=r"No space left on device.*it is as it was"):
        compact(kvtrace.open(path))
    assert everything(kvtrace.open(path)) == expected
    assert [x.name for x in path.iterdir() if x.name.startswith(".")] == []
    monkeypatch.undo()
    # What a killed one left is taken away.
    (path / ".rank-00000.compact" / "tables").mkdir(parents=True)
    assert everything(kvtrace.open(path)) == expected
    compact(kvtrace.open(path))
    assert everything(kvtrace.open(path)) == expected
    assert not (path / ".rank-00000.compact").exists()


def test_who_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.kvtrace"
    with TraceWriter(path, source="synthetic") as writer:
        write_synthetic(writer, SPECS, [5, 1])
        with pytest.raises(TraceError, match="is being recorded"):
            compact(kvtrace.open(path))
    trace = kvtrace.open(path)
    with compact_module._alone_in(path), pytest.raises(TraceError, match="is being compacted"):
        compact(trace)
    monkeypatch.setattr(compact_module, "FORMAT_VERSION", "0.9")
    with pytest.raises(TraceError, match="would leave the rest out"):
        compact(trace)


def test_exchange(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "b").exists()
    assert (tmp_path / "b" / "a").exists()
    with pytest.raises(OSError, match="No such file"):
        exchange(tmp_path / "a", tmp_path / "c")
