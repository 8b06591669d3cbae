"""A writer that is killed, and a reader beside a writer: nothing torn, nothing invented."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import kvtrace

# Row r of layer l holds r + l / 2 in every cell (exact in float32): a reader can tell any value.
WRITER = """
import sys
import numpy as np
from kvtrace import arrays
from kvtrace.writer import LayerSpec, TraceWriter
arrays.CHUNK_BYTES, arrays.CHUNKS_PER_SHARD, arrays.TAIL_BYTES = 1024, 2, 2048
spec = [LayerSpec(layer, 2, 1, 8, 8, 0.5) for layer in range(2)]
writer = TraceWriter(sys.argv[1], source="synthetic", dtype="float32")
model = writer.add_model(name="synthetic")
writer.add_layers(model, spec)
writer.append("requests", {"request": [0], "model": [model], "prompt_tokens": [1]})
print("started", flush=True)
for step in range(int(sys.argv[2])):
    n = 1 + step % 7
    at = np.arange(writer.rows, writer.rows + n)
    writer.append("steps", {"step": [step], "model": [model]})
    writer.append("rows", {"row": at, "step": [step] * n, "request": [0] * n,
                           "position": at, "has_query": [True] * n})
    writer.append("tokens", {"request": [0] * n, "position": at, "token_id": at})
    for layer in range(2):
        value = (at + layer / 2).astype("f4")
        kv = np.broadcast_to(value[:, None, None], (n, 1, 8))
        writer.append_layer(model, layer, q=np.repeat(kv, 2, axis=1), k=kv, v=kv,
                            lse=np.broadcast_to(value[:, None], (n, 2)))
    writer.commit()
writer.close()
"""


def check_values(trace: kvtrace.Trace) -> int:
    """Assert that every committed value is the one that was written; the rows read."""
    trace.refresh()
    if not trace.rows:
        return 0
    rows = len(trace.request_rows(0))
    for layer in range(2):
        data = trace.layer_data(layer)
        want = np.arange(rows) + layer / 2
        for array in (data.q, data.k, data.v, data.lse):
            assert array is not None
            np.testing.assert_array_equal(
                array.reshape(rows, -1), np.repeat(want[:, None], array.size // rows, axis=1)
            )
    ids = trace.tokens()["token_id"].to_numpy()
    np.testing.assert_array_equal(ids[:rows], np.arange(rows))
    return rows


Start = Callable[[Path, int], subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start writers and wait for their first word; none outlives its test."""
    running: list[subprocess.Popen[str]] = []

    def run(path: Path, steps: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WRITER, str(path), str(steps)]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert running[-1].stdout is not None
        assert running[-1].stdout.readline() == "started\n"
        return running[-1]

    yield run
    for process in running:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.parametrize("moment", range(4))
def test_a_killed_writer_leaves_its_last_commit(tmp_path: Path, start: Start, moment: int) -> None:
    path = tmp_path / "x.kvtrace"
    process = start(path, 10_000)
    time.sleep(0.2 + 0.37 * moment)
    seen = check_values(kvtrace.open(path))
    process.send_signal(signal.SIGKILL)
    process.wait()
    trace = kvtrace.open(path)
    assert trace.status == "cut off"
    assert check_values(trace) == trace.rows >= seen
    assert trace.sql("select count(*) as n from rows").to_pylist() == [{"n": trace.rows}]


def test_a_reader_beside_the_writer_never_sees_a_wrong_value(tmp_path: Path, start: Start) -> None:
    path = tmp_path / "x.kvtrace"
    process = start(path, 80)
    trace = kvtrace.open(path)
    reads, rows = 0, 0
    while process.poll() is None:
        now = check_values(trace)
        assert now >= rows
        reads, rows = reads + 1, now
    process.wait()
    assert reads
    assert check_values(trace) == trace.rows == sum(1 + step % 7 for step in range(80))
    assert trace.status == "complete"
