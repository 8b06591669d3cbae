"""A script that lies beside its own schemas/, recorder.py and viewer.py, run as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import kvtrace

SCRIPT = """\
import os, sys
import recorder, schemas, viewer
os.chdir("/")
assert (recorder.OWN, schemas.OWN, viewer.OWN) == (1, 2, 3)
assert not {"torch", "transformers"} & set(sys.modules), "kvtrace imported them first"
import torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.set_num_threads(1)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)
model = LlamaForCausalLM(config).eval()
model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
print("arguments", sys.argv[1:])
if "--fail" in sys.argv:
    raise ValueError("boom")
if "--exit" in sys.argv:
    sys.exit(7)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "schemas").mkdir()
    (tmp_path / "recorder.py").write_text("OWN = 1\n")
    (tmp_path / "schemas" / "__init__.py").write_text("OWN = 2\n")
    (tmp_path / "viewer.py").write_text("OWN = 3\n")
    (tmp_path / "serve.py").write_text(SCRIPT)
    return tmp_path


def kvtrace_record(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvtrace.cli", "record", *words]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=240)


def test_a_script_beside_names_like_ours(project: Path) -> None:
    done = kvtrace_record(project, "--", "serve.py", "--flag", "x")
    assert (done.returncode, done.stdout) == (0, "arguments ['--flag', 'x']\n")
    (path,) = (project / "traces").glob("serve-*.kvtrace")
    trace = kvtrace.open(path)
    assert (trace.status, trace.rows) == ("complete", 6)
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"kvtrace: 6 tokens of 1 requests in {path.relative_to(project)}")
    assert "kvtrace replay" in last
    assert "kvtrace view" in last


def test_a_script_that_raises_keeps_its_traceback_exit_code_and_trace(project: Path) -> None:
    done = kvtrace_record(project, "--out", "a.kvtrace", "--", "serve.py", "--fail")
    plain = subprocess.run(
        [sys.executable, "serve.py", "--fail"], cwd=project, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (plain.returncode, plain.stdout)
    assert done.stderr.startswith(plain.stderr)
    assert plain.stderr.splitlines()[-1] == "ValueError: boom"
    trace = kvtrace.open(project / "a.kvtrace")
    assert (trace.status, trace.rows) == ("cut off", 6)

    again = kvtrace_record(project, "--out", "a.kvtrace", "--", "serve.py")
    assert again.returncode == 1
    assert again.stderr.startswith("error: a.kvtrace exists; ")
    assert "--force" in again.stderr
    forced = kvtrace_record(project, "--out", "a.kvtrace", "--force", "--", "serve.py", "--exit")
    assert forced.returncode == 7
    assert kvtrace.open(project / "a.kvtrace").status == "complete"


def test_a_command_is_recorded_in_its_own_process(project: Path) -> None:
    shell = f"{sys.executable} -u serve.py --fail; exit 3"
    done = kvtrace_record(project, "--out", "a.kvtrace", "--", "sh", "-c", shell)
    assert done.returncode == 3
    assert "ValueError: boom" in done.stderr
    trace = kvtrace.open(project / "a.kvtrace")
    assert (trace.status, trace.rows) == ("cut off", 6)


def test_a_module_and_a_program_without_a_model(project: Path) -> None:
    done = kvtrace_record(project, "--out", "a.kvtrace", "--", "-m", "serve", "--exit")
    assert done.returncode == 7
    assert kvtrace.open(project / "a.kvtrace").rows == 6
    done = kvtrace_record(project, "--out", "b.kvtrace", "--", "-m", "json.tool", "--help")
    assert done.returncode == 0
    assert "no transformers model ran" in done.stderr


@pytest.mark.parametrize("words", [["--", "none.py"], ["--", "no-such-command"], ["--"], []])
def test_nothing_to_run_is_one_line(project: Path, words: list[str]) -> None:
    done = kvtrace_record(project, *words)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (project / "traces").exists()
