"""What `kvtrace record` says of a program that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from kvtrace_recorder import demo

SCRIPT = f"""
import os, signal, time
import kvtrace
from transformers import AutoModelForCausalLM
import torch
model = AutoModelForCausalLM.from_pretrained({str(demo.MODEL_DIR)!r})
model.generate(torch.arange(3, 40)[None], max_new_tokens=4, min_new_tokens=4, do_sample=False)
# What was not committed may be lost.
while kvtrace.open("a.kvtrace").rows < 40:
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_commands_trace_is_sealed_before_it_is_summed_up(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(SCRIPT)
    # `env` makes it a command of its own rather than a script in the verb's process.
    words = ["record", "--out", "a.kvtrace", "--", "env", sys.executable, "killed.py"]
    done = subprocess.run(
        [sys.executable, "-m", "kvtrace.cli", *words],
        cwd=tmp_path,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 128 + signal.SIGKILL
    assert "kvtrace: 40 tokens of 1 requests in a.kvtrace" in done.stderr
    assert ", cut off); next:" in done.stderr
