"""Disks that are full or read-only in earnest: a small tmpfs, folders made immutable, a mount.

The mounts live in a namespace of their own and go with the process. As root, which tests in a
container usually are, permission bits stop nobody: hence chattr.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvtrace.check import check
from kvtrace.check.report import Status

SCRIPT = """
import json, shutil, subprocess, sys, time
from pathlib import Path
import torch
import kvtrace
from kvtrace import KvtraceError
from kvtrace_recorder import record
from support.tiny import llama

torch.set_num_threads(1)
root, model = Path(sys.argv[1]), llama(hidden_size=64, max_position_embeddings=4096)
found = {}

def run(name, meanwhile=lambda trace: None):
    path = root / name / "x.kvtrace"
    try:
        with record(model, path, progress=False, on_full="wait"), torch.no_grad():
            for step in range(12):
                model(torch.randint(3, 60, (1, 700)))
                if step == 2:
                    while not path.exists() or not kvtrace.open(path).rows:
                        time.sleep(0.01)
                    meanwhile(path)
    except KvtraceError as error:
        found[name] = str(error)
        return
    found[name] = kvtrace.open(path).rows
    shutil.copytree(path, root / f"{name}.kvtrace")

def mount(name, options):
    (root / name).mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(root / name)], check=True)

mount("full", "size=3m")
run("full")
mount("read-only", "ro")
run("read-only")
try:
    (root / "frozen").mkdir()
    run("frozen", lambda path: subprocess.run(["chattr", "-R", "+i", str(path)], check=True))
except subprocess.CalledProcessError:
    found["frozen"] = None
finally:
    subprocess.run(["chattr", "-R", "-i", str(root / "frozen")], check=False)
print(json.dumps(found))
"""


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode != 0,
    reason="this user may not mount anything",
)
def test_the_program_goes_on_and_what_was_committed_stays(tmp_path: Path) -> None:
    command = ["unshare", "-m", sys.executable, "-c", SCRIPT, str(tmp_path)]
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        command, cwd=tests, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    messages = done.stderr.splitlines()
    full = f"kvtrace: writing {tmp_path}/full/x.kvtrace failed: No space left on device; "
    assert sum(line.startswith(full) for line in messages) == 1
    assert 0 < found["full"] < 12 * 700
    assert check(tmp_path / "full.kvtrace").status is Status.CUT_OFF
    assert found["read-only"] == (
        f"{tmp_path}/read-only/x.kvtrace cannot be made (Read-only file system); a folder that can"
        " be written was expected; choose another with --out, or make room"
    )
    if found["frozen"] is None:
        pytest.skip("files here cannot be made immutable")
    frozen = f"kvtrace: writing {tmp_path}/frozen/x.kvtrace failed: Operation not permitted; "
    assert sum(line.startswith(frozen) for line in messages) == 1
    assert 0 < found["frozen"] < 12 * 700
    assert check(tmp_path / "frozen.kvtrace").status is Status.CUT_OFF
