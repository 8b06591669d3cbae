"""However a recorded program ends: its trace opens, its exit status is its own, nothing hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import kvtrace
from kvtrace.errors import TraceError

# Runs a tiny model with random weights again and again; `{first}` comes before, `{last}` after.
PROGRAM = """\
import os, signal, sys, threading, time
{first}
import torch
torch.set_num_threads(1)
from transformers import LlamaConfig, LlamaForCausalLM
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
    eos_token_id=None)).eval()
def run():
    model.generate(torch.arange(5, 8)[None], max_new_tokens=4, do_sample=False)
def forever():
    while True:
        run()
        time.sleep(0.01)
{last}
"""

Start = Callable[..., subprocess.Popen[str]]


def heed_signals() -> None:
    """Undo what `nohup` and a shell's `&` leave to every child: signals that are ignored."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start `kvtrace record` on PROGRAM; nothing outlives the test."""
    running: list[subprocess.Popen[str]] = []

    def run(
        first: str = "", last: str = "forever()", by_command: bool = False
    ) -> subprocess.Popen[str]:
        (tmp_path / "work.py").write_text(PROGRAM.format(first=first, last=last))
        words = [sys.executable, "-u", "work.py"] if by_command else ["work.py"]
        verb = [sys.executable, "-m", "kvtrace.cli", "record", "--out", "run.kvtrace", "--"]
        running.append(
            subprocess.Popen(
                [*verb, *words],
                cwd=tmp_path,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                preexec_fn=heed_signals,
            )
        )
        return running[-1]

    yield run
    for process in running:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def ends(process: subprocess.Popen[str], status: int) -> None:
    """Wait for a program's end; what it said last is shown where that is not the one expected."""
    found = process.wait(200)
    assert process.stderr is not None
    # A child of it may hold the other end open.
    os.set_blocking(process.stderr.fileno(), False)
    assert found == status, process.stderr.read()


def opened(folder: Path, rows: int = 1) -> kvtrace.Trace:
    """The trace, once it holds so many rows."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        try:
            trace = kvtrace.open(folder / "run.kvtrace")
        except TraceError:
            time.sleep(0.05)
            continue
        if trace.rows >= rows:
            return trace
        time.sleep(0.05)
    raise AssertionError(f"no trace of {rows} rows in {folder}: {list(folder.iterdir())}")


def check_sealed(folder: Path, status: str) -> kvtrace.Trace:
    """Assert that the trace reads to its last commit, and how it says that it ended."""
    deadline = time.monotonic() + 100
    while (trace := kvtrace.open(folder / "run.kvtrace")).status == "recording":
        assert time.monotonic() < deadline, "nothing writes any more, and it says recording"
        time.sleep(0.05)
    assert trace.status == status
    count = 0
    for request in trace.requests():
        # Whole steps only: a request of 3 and 3 tokens has as many rows as it has positions.
        weights = trace.attention(1, 2, request=request.request)
        assert weights.shape == (request.tokens, request.tokens)
        assert weights.sum(axis=1) == pytest.approx(1, abs=1e-2)
        count += request.tokens
    assert trace.sql("select count(*) as n from rows").to_pylist() == [{"n": count}]
    assert count == trace.rows
    return trace


EXIT_ON_TERM = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))"
CATCH = "try:\n    forever()\nexcept KeyboardInterrupt:\n    sys.exit(4)"


@pytest.mark.parametrize(
    ("number", "first", "last", "returned", "status"),
    [
        (signal.SIGTERM, "", "forever()", -signal.SIGTERM, "complete"),
        (signal.SIGTERM, EXIT_ON_TERM, "forever()", 5, "complete"),
        (signal.SIGINT, "", "forever()", 130, "cut off"),
        (signal.SIGINT, "", CATCH, 4, "complete"),
        (signal.SIGKILL, "", "forever()", -signal.SIGKILL, "cut off"),
        (signal.SIGABRT, "", "forever()", -signal.SIGABRT, "cut off"),
    ],
)
def test_a_script_that_is_sent_a_signal(
    number: int, first: str, last: str, returned: int, status: str, start: Start, tmp_path: Path
) -> None:
    process = start(first, last)
    seen = opened(tmp_path).rows
    process.send_signal(number)
    ends(process, returned)
    assert check_sealed(tmp_path, status).rows >= seen


# Other threads of the recorder need this lock before they can end.
IN_A_LOCK = """
from kvtrace_recorder.pipeline import Pipeline
put = Pipeline.put
def interrupted(self, *message):
    with self._changed:
        if threading.current_thread() is threading.main_thread() and self.status.rows:
            Pipeline.put = put
            os.kill(os.getpid(), signal.SIGTERM)
        put(self, *message)
Pipeline.put = interrupted
forever()
"""


def test_sigterm_while_the_recorder_holds_a_lock(start: Start, tmp_path: Path) -> None:
    assert start(last=IN_A_LOCK).wait(200) == -signal.SIGTERM
    assert check_sealed(tmp_path, "complete").rows


@pytest.mark.parametrize(
    ("number", "first", "returned", "status"),
    [
        (signal.SIGTERM, "", 128 + signal.SIGTERM, "complete"),
        (signal.SIGTERM, EXIT_ON_TERM, 5, "complete"),
        (signal.SIGHUP, "", 128 + signal.SIGHUP, "cut off"),
    ],
)
def test_what_ends_kvtrace_record_reaches_the_command(
    number: int, first: str, returned: int, status: str, start: Start, tmp_path: Path
) -> None:
    process = start(first, by_command=True)
    trace = opened(tmp_path)
    (pid,) = trace.table("runs")["pid"].to_pylist()
    assert pid != process.pid
    process.send_signal(number)
    ends(process, returned)
    check_sealed(tmp_path, status)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


# As servers do: SIGTERM is taken before a model is loaded, and raised again after the shutdown.
SERVER = """
import transformers
stopped = threading.Event()
before = signal.signal(signal.SIGTERM, lambda *_: stopped.set())
"""
SERVE = """
while not stopped.is_set():
    run()
signal.signal(signal.SIGTERM, before)
signal.raise_signal(signal.SIGTERM)
"""


def test_a_server_that_loads_its_model_late(start: Start, tmp_path: Path) -> None:
    process = start(SERVER, SERVE, by_command=True)
    opened(tmp_path)
    process.send_signal(signal.SIGTERM)
    ends(process, 128 + signal.SIGTERM)
    check_sealed(tmp_path, "complete")


# A child inherits what its parent did about SIGTERM, whichever of them records.
FORKED = """
import transformers
if os.fork():
    os.wait()
    sys.exit()
"""


def test_a_forked_worker_that_loads_a_model(start: Start, tmp_path: Path) -> None:
    start(FORKED, by_command=True)
    (pid,) = opened(tmp_path).table("runs")["pid"].to_pylist()
    os.kill(pid, signal.SIGTERM)
    check_sealed(tmp_path, "complete")


def test_a_command_that_is_killed(start: Start, tmp_path: Path) -> None:
    process = start(by_command=True)
    (pid,) = opened(tmp_path).table("runs")["pid"].to_pylist()
    os.kill(pid, signal.SIGKILL)
    ends(process, 128 + signal.SIGKILL)
    check_sealed(tmp_path, "cut off")


IN_A_THREAD = (
    "run()\nthread = threading.Thread(target={what})\nthread.start()\nthread.join()\nrun()"
)

LATE_THREAD = "run()\nthreading.Thread(target=lambda: (time.sleep(1), run())).start()"
POOL = """
from concurrent.futures import ThreadPoolExecutor
pool = ThreadPoolExecutor(2)
run()
pool.submit(lambda: (time.sleep(1), run()))
"""

DAEMON = """
thread = threading.Thread(target=lambda: (run(), ran.set(), time.sleep(600)), daemon=True)
ran = threading.Event()
thread.start()
ran.wait()
"""

COMMITTED = """
import kvtrace
while kvtrace.open("run.kvtrace").rows < 6:
    time.sleep(0.01)
"""

#: How a program ends: its exit status, the rows it leaves, and what the trace says of it.
ENDS = {
    "os._exit": (f"run()\n{COMMITTED}\nos._exit(3)", 3, 6, "cut off"),
    "sys.exit": ("run()\nsys.exit(3)", 3, 6, "complete"),
    "exception": ("run()\nraise ValueError", 1, 6, "cut off"),
    # It ends the thread, not the program.
    "sys.exit in a thread": (IN_A_THREAD.format(what="lambda: sys.exit(3)"), 0, 12, "complete"),
    # The interpreter waits for it, and it runs the model meanwhile.
    "thread": (LATE_THREAD, 0, 12, "complete"),
    # Idle workers end with the program, and not before.
    "pool": (POOL, 0, 12, "complete"),
    # The interpreter does not wait for it.
    "daemon": (DAEMON, 0, 6, "complete"),
}
#: Those that go another way in a process of their own.
BY_COMMAND = ("os._exit", "sys.exit", "thread", "pool")


@pytest.mark.parametrize(
    ("end", "by_command"), [*((x, False) for x in ENDS), *((x, True) for x in BY_COMMAND)]
)
def test_a_program_that_ends_in_its_own_way(
    end: str, by_command: bool, start: Start, tmp_path: Path
) -> None:
    last, returned, rows, status = ENDS[end]
    process = start(last=last, by_command=by_command)
    ends(process, returned)
    trace = check_sealed(tmp_path, status)
    assert trace.rows == rows


def test_a_child_that_lives_on_does_not_keep_the_recording_open(
    start: Start, tmp_path: Path
) -> None:
    child = "child = os.fork()\nif child == 0:\n    time.sleep(600)\n    os._exit(0)\n"
    process = start(last=f"run()\n{child}forever()")
    opened(tmp_path, 12)
    process.kill()
    process.wait(200)
    check_sealed(tmp_path, "cut off")
