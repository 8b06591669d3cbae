"""A disk that is full or cannot be written any more, and readers that come too early."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvtrace
from kvtrace import InputError, TraceError, arrays, files, journal
from kvtrace.check import check
from kvtrace.check.report import Status
from kvtrace.checksums import FileSum
from kvtrace.cli import main
from kvtrace.layout import FORMAT_VERSION
from kvtrace.manifest import Manifest
from kvtrace.writer import LayerSpec, TraceWriter

SPEC = LayerSpec(0, 2, 1, 8, 8, 0.5)


def write_step(writer: TraceWriter, step: int) -> None:
    """Three rows whose every value is their number."""
    at = np.arange(writer.rows, writer.rows + 3)
    writer.append("steps", {"step": [step], "model": [0]})
    columns: dict[str, Any] = {"row": at, "step": [step] * 3, "request": [0] * 3, "position": at}
    writer.append("rows", {**columns, "has_query": [True] * 3})
    writer.append("tokens", {"request": [0] * 3, "position": at, "token_id": at, "row": at})
    kv = np.broadcast_to(at[:, None, None], (3, 1, 8)).astype("f4")
    lse = np.broadcast_to(at[:, None], (3, 2)).astype("f4")
    writer.append_layer(0, 0, q=np.repeat(kv, 2, axis=1), k=kv, v=kv, lse=lse)


@pytest.mark.parametrize(
    ("number", "writes", "recovers"),
    [
        *((errno.ENOSPC, writes, recovers) for writes in (0, 5, 8, 11) for recovers in (0, 1)),
        (errno.EROFS, 6, False),
        (errno.EACCES, 30, False),
    ],
)
def test_what_was_committed_stays_and_nothing_follows_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, writes: int, recovers: bool
) -> None:
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 64)
    monkeypatch.setattr(arrays, "CHUNKS_PER_SHARD", 2)
    writer = TraceWriter(tmp_path / "x.kvtrace", source="synthetic", dtype="float32")
    model = writer.add_model(name="synthetic")
    writer.add_layers(model, [SPEC])
    writer.append("requests", {"request": [0], "model": [model], "prompt_tokens": [3]})
    write_step(writer, 0)
    writer.commit()
    left = writes
    write_all = files._write_all

    def fail(handle: int, parts: tuple[bytes, ...]) -> FileSum:
        nonlocal left
        left -= 1
        if left < 0 and not (recovers and left < -1):
            # Half of it gets there.
            whole = b"".join(parts)
            os.write(handle, whole[: len(whole) // 2])
            raise OSError(number, os.strerror(number))
        return write_all(handle, parts)

    monkeypatch.setattr(files, "_write_all", fail)

    def go_on() -> None:
        for step in range(1, 30):
            write_step(writer, step)
            writer.commit()

    with pytest.raises(OSError, match=os.strerror(number)):
        go_on()
    with pytest.raises(OSError, match=os.strerror(number)):
        writer.close(complete=False)
    trace = kvtrace.open(tmp_path / "x.kvtrace")
    assert trace.status == "cut off"
    k = trace.layer_data(0).k
    assert k is not None
    np.testing.assert_array_equal(k[:, 0, 0], np.arange(trace.rows))
    assert trace.tokens()["token_id"].to_pylist() == list(range(trace.rows))
    assert check(trace.path).status is Status.CUT_OFF


def test_half_a_line_of_the_journal_is_taken_back(tmp_path: Path) -> None:
    writer = journal.JournalWriter(tmp_path / "journal")
    writer.append(1, {}, closed=False, complete=False)
    whole = (tmp_path / "journal").read_bytes()
    file = writer._file

    class Full:
        """A file whose disk takes half of what is written."""

        def write(self, data: bytes) -> int:
            return file.write(data[: len(data) // 2])

        def __getattr__(self, name: str) -> object:
            return getattr(file, name)

    writer._file = Full()  # type: ignore[assignment]
    with pytest.raises(OSError, match="cut off"):
        writer.append(2, {}, closed=False, complete=False)
    assert (tmp_path / "journal").read_bytes() == whole
    writer._file = file
    writer.append(3, {}, closed=False, complete=False)
    writer.close()
    assert journal.JournalReader(tmp_path / "journal").state.rows == 3


def test_readers_that_come_before_the_first_commit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.kvtrace"
    path.mkdir()
    with pytest.raises(TraceError, match="is not a kvtrace trace"):
        kvtrace.open(path)
    Manifest("0.1.0", 0, "synthetic", [], FORMAT_VERSION).write(path)
    with pytest.raises(TraceError, match="has not begun to write"):
        kvtrace.open(path)
    (path / "rank-00000").mkdir()
    with pytest.raises(TraceError, match="has not begun to write"):
        kvtrace.open(path)
    (path / "rank-00000/journal").touch()
    trace = kvtrace.open(path)
    assert (trace.rows, trace.requests(), trace.layers) == (0, [], [])
    with pytest.raises(InputError, match="request 0 was not found"):
        trace.attention(0, 0)
    assert trace.sql("select count(*) as n from rows").to_pylist() == [{"n": 0}]
    assert main(["info", str(path)]) == 0
    assert main(["check", str(path)]) == 3
    assert "0 rows were committed" in capsys.readouterr().out
