"""Programs of several processes: each that runs a model records into a rank of its own."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import kvtrace
from kvtrace.errors import TraceError

# A tiny model with random weights; `tokens` says how many a process records.
MODEL = """\
import torch
torch.set_num_threads(1)
from transformers import LlamaConfig, LlamaForCausalLM

def model():
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
        eos_token_id=None)).eval()

def run(tokens):
    ids = torch.arange(5, 8)[None]
    return model().generate(ids, max_new_tokens=tokens - 2, do_sample=False)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tiny.py").write_text(MODEL)
    return tmp_path


def kvtrace_record(folder: Path, *words: str, status: int = 0) -> str:
    """Run `kvtrace record --out run.kvtrace -- WORDS`; its standard error."""
    command = [sys.executable, "-m", "kvtrace.cli", "record", "--out", "run.kvtrace", "--", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr


def run_verb(command: list[str]) -> str:
    """Run `kvtrace VERB ...`; its standard output."""
    words = [sys.executable, "-m", "kvtrace.cli", *command[1:]]
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=240).stdout


def check(folder: Path, expected: dict[int, int]) -> kvtrace.Trace:
    """Assert which ranks there are and how many rows each holds, in arrays and in SQL."""
    trace = kvtrace.open(folder / "run.kvtrace")
    assert (trace.ranks, trace.status) == (sorted(expected), "complete")
    for rank, rows in expected.items():
        part = kvtrace.open(trace.path, rank)
        assert (part.rows, part.status) == (rows, "complete")
        (request,) = part.requests()
        first = rank * 1_000_000_000
        assert (request.request, request.model, request.tokens) == (first, first, rows)
        assert part.attention(1, 3, request=first).sum(axis=1) == pytest.approx(1, abs=1e-2)
        assert part.table("runs")["run"].to_pylist() == [rank]
        # The whole trace has what the rank has.
        whole = trace.attention(1, 3, request=first)
        assert whole.tolist() == part.attention(1, 3, request=first).tolist()
        assert trace.tokens(first).equals(part.tokens(first))
    found = trace.sql(
        "select runs.run, count(distinct steps.step) as steps, min(steps.step) as first,"
        " count(rows.row) as rows from runs join steps using (run) join rows using (step)"
        " group by all order by 1"
    )
    assert found.to_pylist() == [
        {"run": rank, "steps": rows - 2, "first": rank * 1_000_000_000, "rows": rows}
        for rank, rows in sorted(expected.items())
    ]
    assert trace.table("gaps").num_rows == 0
    assert (trace.rows, len(trace.requests())) == (sum(expected.values()), len(expected))
    assert trace.sql("select count(distinct row) n from tokens")["n"].to_pylist() == [trace.rows]
    return trace


DISTRIBUTED = """\
import torch.distributed as dist
from tiny import run
dist.init_process_group("gloo")
run(4 + dist.get_rank())
dist.barrier()
dist.destroy_process_group()
"""
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]


def free_port() -> str:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return str(bound.getsockname()[1])


def test_torchrun(folder: Path) -> None:
    (folder / "work.py").write_text(DISTRIBUTED)
    error = kvtrace_record(folder, sys.executable, *TORCHRUN, free_port(), "work.py")
    assert "9 tokens of 2 requests by 2 processes" in error
    check(folder, {0: 4, 1: 5})
    whole = kvtrace.open(folder / "run.kvtrace")
    # One host: its monotonic clock is shared.
    assert [clock.basis for clock in whole.clocks().values()] == ["reference", "monotonic"]
    command = ["kvtrace", "replay", str(whole.path), "--policy", "h2o", "--budget", "3", "--json"]
    (result,) = json.loads(run_verb(command))
    assert result["tokens"] == 9
    run_verb(["kvtrace", "export", str(whole.path), "--perfetto", str(folder / "timeline.json")])
    events = json.loads((folder / "timeline.json").read_text())["traceEvents"]
    # Both waited for each other at the barrier, so what they did lies within some seconds.
    assert {event["pid"] for event in events} == {0, 1}
    assert max(event.get("ts", 0) for event in events) < 100e6
    # The numbers are torchrun's own.
    trace = kvtrace.open(folder / "run.kvtrace", rank=1)
    assert trace.requests()[0].tokens == 5
    with pytest.raises(TraceError, match=r"rank 2 was not found in .*; it has 0, 1"):
        kvtrace.open(folder / "run.kvtrace", rank=2)


def test_a_script_that_records_itself_under_torchrun(folder: Path) -> None:
    recorded = DISTRIBUTED.replace(
        "run(4 + dist.get_rank())",
        "from kvtrace_recorder import record\n"
        "with record(None, 'run.kvtrace', force=True, strict=True):\n"
        "    run(4 + dist.get_rank())",
    )
    (folder / "work.py").write_text(recorded)
    for _ in range(2):
        command = [sys.executable, *TORCHRUN, free_port(), "work.py"]
        subprocess.run(command, cwd=folder, check=True, timeout=240)
        check(folder, {0: 4, 1: 5})


SPAWN = """\
import multiprocessing
from tiny import run
if __name__ == "__main__":
    context = multiprocessing.get_context("{method}")
    for tokens in (4, 5):
        process = context.Process(target=run, args=(tokens,))
        process.start()
        process.join(200)
        assert process.exitcode == 0, process.exitcode
"""


@pytest.mark.parametrize(
    "method", ["spawn", "fork", pytest.param("forkserver", marks=pytest.mark.slow)]
)
def test_children_of_a_script(method: str, folder: Path) -> None:
    (folder / "work.py").write_text(SPAWN.format(method=method))
    error = kvtrace_record(folder, "work.py")
    assert "9 tokens of 2 requests by 2 processes" in error
    # The script itself imports transformers, runs no model, and leaves no rank.
    check(folder, {0: 4, 1: 5})


FORK = """\
import os, sys
from tiny import run, model
{before}
child = os.fork()
if child == 0:
    run(5)
    {end}
_, status = os.waitpid(child, 0)
run(6)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize("end", ["sys.exit(7)", "os._exit(7)"])
def test_a_forked_child_of_a_recorded_process_has_a_rank_of_its_own(end: str, folder: Path) -> None:
    (folder / "work.py").write_text(FORK.format(before="", end=end))
    kvtrace_record(folder, "work.py", status=7)
    trace = kvtrace.open(folder / "run.kvtrace")
    assert trace.ranks == [0, 1]
    child, parent = (kvtrace.open(trace.path, rank) for rank in (0, 1))
    assert (parent.rows, parent.status) == (6, "complete")
    assert child.status == ("complete" if "sys" in end else "cut off")
    assert child.rows == 5 or "sys" not in end


ALONE = """\
import multiprocessing, os, sys
from tiny import model, run
from kvtrace_recorder import record
with record(None, "run.kvtrace", strict=True):
    run(4)
    child = os.fork()
    if child == 0:
        run(5)
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
    pool = multiprocessing.get_context("fork").Pool(1)
    pool.map(run, [5])
    pool.close()
    pool.join()
"""


def test_a_forked_child_does_not_write_into_a_recording_of_its_parent(folder: Path) -> None:
    (folder / "work.py").write_text(ALONE)
    subprocess.run([sys.executable, "work.py"], cwd=folder, check=True, timeout=240)
    check(folder, {0: 4})


def test_a_child_that_forks_in_a_recording_may_record_for_itself(folder: Path) -> None:
    code = ALONE.replace(
        "        run(5)\n",
        "        with record(None, 'child.kvtrace', strict=True):\n            run(5)\n",
    )
    (folder / "work.py").write_text(code)
    subprocess.run([sys.executable, "work.py"], cwd=folder, check=True, timeout=240)
    check(folder, {0: 4})
    (folder / "run.kvtrace").rename(folder / "parent.kvtrace")
    (folder / "child.kvtrace").rename(folder / "run.kvtrace")
    check(folder, {0: 5})


def test_a_module_of_a_package(folder: Path) -> None:
    (folder / "package").mkdir()
    (folder / "package" / "__init__.py").touch()
    (folder / "package" / "work.py").write_text(
        "import sys\nfrom tiny import run\nrun(int(sys.argv[1]))\nassert __package__ == 'package'\n"
    )
    kvtrace_record(folder, "-m", "package.work", "6")
    check(folder, {0: 6})


def test_a_program_without_a_model_leaves_nothing(folder: Path) -> None:
    (folder / "work.py").write_text("import transformers\n")
    for words in (["work.py"], [sys.executable, "-O", "work.py"]):
        assert "no transformers model ran" in kvtrace_record(folder, *words)
        assert not (folder / "run.kvtrace").exists()


def test_processes_that_need_no_recorder_do_not_load_it(folder: Path) -> None:
    (folder / "work.py").write_text(
        "import subprocess, sys\n"
        'code = \'import sys; print([x for x in ["zarr", "numpy"] if x in sys.modules])\'\n'
        "sys.exit(subprocess.check_output([sys.executable, '-c', code]) != b'[]\\n')\n"
    )
    kvtrace_record(folder, sys.executable, "-u", "work.py")


def test_an_older_trace_is_not_joined(folder: Path) -> None:
    (folder / "work.py").write_text("from tiny import run\nrun(4)\n")
    kvtrace_record(folder, "work.py")
    assert "exists; a new path was expected" in kvtrace_record(folder, "work.py", status=1)
    check(folder, {0: 4})


def test_info_lists_the_ranks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kvtrace.cli import main
    from kvtrace.writer import LayerSpec, TraceWriter

    for rank in (0, 2):
        with TraceWriter(folder / "run.kvtrace", rank=rank, launch="one", source="synthetic") as w:
            model = w.add_model(name="synthetic")
            w.add_layers(model, [LayerSpec(0, 2, 1, 8, 8, 0.5)])
            w.append("steps", {"step": [0], "model": [model]})
            if rank == 2:
                w.add_gap("rows", 1, "lost")
            assert kvtrace.open(w.path).status == "recording"
    with pytest.raises(TraceError, match=r"rank 2 of .* is taken"):
        TraceWriter(folder / "run.kvtrace", rank=2, launch="one")
    with TraceWriter(folder / "run.kvtrace", rank=None, launch="one") as w:
        assert w.rank == 1
    assert main(["info", str(folder / "run.kvtrace")]) == 0
    shown = capsys.readouterr().out
    assert "rank      2: 0 rows, complete" in shown
    # Two of the three had a step; what any of them lacks is said.
    assert "2 steps" in shown
    assert "gap       1 rows: lost" in shown
    found = kvtrace.open(folder / "run.kvtrace").sql("select model from models order by model")
    assert found["model"].to_pylist() == [0, 2_000_000_000]
