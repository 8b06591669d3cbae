"""Recorders that are killed at any moment while another process reads: nothing torn or invented.

A tiny Llama with seeded random weights says the same every time, so that every row of a killed
recording must be the row of a whole one.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvtrace
from kvtrace import TraceError
from kvtrace.check import check
from kvtrace.check.report import Status

TOKENS = 300
#: Forks a recorder for every line it reads: torch is imported once.
HOST = """
import os, signal, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from kvtrace_recorder import record
torch.set_num_threads(1)
torch.manual_seed(0)
shape = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=None,
             max_position_embeddings=1024)
model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
prompt = torch.arange(1, 13)[None]
for line in sys.stdin:
    path, tokens, *held = line.split()
    if os.fork():
        continue
    with record(model, path, on_full="wait", progress=False, command=["killed"]) as recording:
        print(os.getpid(), recording.writer_pid, flush=True)
        if held:
            signal.sigwait([signal.SIGUSR1])
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                             max_new_tokens=int(tokens), min_new_tokens=int(tokens))
    print("done", int(out.sum()), flush=True)
    os._exit(0)
"""


class Host:
    """Starts recorders."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", HOST],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        # What the children say last stands in a pipe that nobody else reads.
        self.lines: Any = self._process.stdout

    def start(self, path: Path, held: str = "") -> tuple[int, int]:
        """Begin to record into a new trace; the host's and the writer's process.

        With `held`, the model does nothing before the host is sent SIGUSR1.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(f"{path} {TOKENS} {held}\n")
        self._process.stdin.flush()
        host, writer = self.lines.readline().split()
        return int(host), int(writer)

    def finish(self, path: Path) -> str:
        """Record to the end; what the host says then."""
        self.start(path)
        return str(self.lines.readline())

    def end(self) -> str:
        """End; what was said on standard error."""
        _, errors = self._process.communicate()
        return errors


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """One that lives as long as the tests."""
    started = Host()
    yield started
    started.end()


@pytest.fixture(scope="module")
def whole(host: Host, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What a recording that nobody disturbed holds."""
    path = tmp_path_factory.mktemp("whole") / "x.kvtrace"
    assert host.finish(path).startswith("done")
    return values(kvtrace.open(path))


def values(trace: kvtrace.Trace) -> dict[str, np.ndarray]:
    """Every value of the request, by what it is, a row each."""
    if not trace.requests():
        return {}
    found = {"tokens": trace.tokens()["token_id"].to_numpy()}
    for layer in range(2):
        data = trace.layer_data(layer)
        for kind in ("q", "k", "v", "lse"):
            value = getattr(data, kind)
            found[f"{kind} {layer}"] = value.reshape(len(value), -1)
    return found


def assert_prefix(trace: kvtrace.Trace, whole: dict[str, np.ndarray]) -> int:
    """Compare everything with the whole recording; rows read."""
    rows = 0
    for name, value in values(trace).items():
        rows = len(value)
        # How many rows' lse are summed at once depends on when they came: the last bit differs.
        tolerance = 1e-6 if name.startswith("lse") else 0
        np.testing.assert_allclose(value, whole[name][:rows], tolerance, tolerance, err_msg=name)
    return rows


class Reader:
    """Reads a trace again and again, and how old a step was when it was first seen."""

    def __init__(self, path: Path, whole: dict[str, np.ndarray]) -> None:
        self._path, self._whole = path, whole
        self._trace: kvtrace.Trace | None = None
        self.rows, self.reads = 0, 0
        self.ages_ms: list[float] = []
        self._steps = 0

    def read(self) -> None:
        """Once; before the first commit there is nothing."""
        if self._trace is None:
            try:
                self._trace = kvtrace.open(self._path)
            except TraceError as error:
                assert "has not begun" in str(error) or "not a kvtrace" in str(error)  # noqa: PT017
                return
        self._trace.refresh()
        seen_ns = time.time_ns()
        rows = assert_prefix(self._trace, self._whole)
        assert rows >= self.rows
        self.rows, self.reads = rows, self.reads + 1
        steps = self._trace.table("steps")
        for row in steps.slice(self._steps).to_pylist():
            ended_ns = row["started_ns"] + (row["duration_ns"] or 0)
            self.ages_ms.append((seen_ns - ended_ns) / 1e6)
        self._steps = steps.num_rows


def kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            # It had just finished.
            continue


def wait_until_sealed(path: Path) -> kvtrace.Trace:
    """The trace once no process writes it any more."""
    while kvtrace.open(path).status == "recording":
        time.sleep(0.02)
    return kvtrace.open(path)


def kill_recorders(count: int, host: Host, whole: dict[str, np.ndarray], folder: Path) -> None:
    """Kill so many at random moments; print what was read and how old it was."""
    moments = random.Random(count)  # noqa: S311 - nothing secret
    ages: list[float] = []
    reads = 0
    for number in range(count):
        path = folder / f"{number}.kvtrace"
        recorder, writer = host.start(path)
        victims = [[recorder], [writer], [recorder, writer]][number % 3]
        reader = Reader(path, whole)
        until = moments.randrange(0, len(whole["tokens"]) - 20)
        while reader.rows < until:
            reader.read()
        time.sleep(moments.random() * 0.1)
        kill(victims)
        if recorder not in victims:
            # A writer that is gone does not stop the model.
            assert host.lines.readline().startswith("done")
        trace = wait_until_sealed(path)
        assert assert_prefix(trace, whole) >= reader.rows
        assert check(path).status in (Status.CUT_OFF, Status.WHOLE)
        ages += reader.ages_ms
        reads += reader.reads
    p50, p95 = statistics.median(ages), statistics.quantiles(ages, n=20)[-1]
    print(
        f"\n{count} recorders killed, {reads} reads beside them, no wrong value;"
        f" age of a step when first read: p50 {p50:.0f} ms, p95 {p95:.0f} ms"
    )


def test_recorders_killed_at_random_moments(
    host: Host, whole: dict[str, np.ndarray], tmp_path: Path
) -> None:
    kill_recorders(3, host, whole, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_recorders_killed_at_random_moments(
    host: Host, whole: dict[str, np.ndarray], tmp_path: Path
) -> None:
    kill_recorders(50, host, whole, tmp_path)


def test_a_full_disk_ends_the_recording_and_not_the_program(
    host: Host, whole: dict[str, np.ndarray], tmp_path: Path
) -> None:
    path = tmp_path / "x.kvtrace"
    recorder, writer = host.start(path, "held")
    # No file of the writer's may grow past so many bytes: the system refuses as a full disk does.
    # A chunk of all the rows is larger.
    size = 12_000
    resource.prlimit(writer, resource.RLIMIT_FSIZE, (size, size))
    os.kill(recorder, signal.SIGUSR1)
    assert host.lines.readline().startswith("done")
    trace = wait_until_sealed(path)
    assert trace.status == "cut off"
    assert assert_prefix(trace, whole) < len(whole["tokens"])
    assert check(path).status is Status.CUT_OFF
    assert recorder != writer
