"""Recording a command that needs a process of its own: `kvtrace record -- some-command ARGS`.

The command runs with a folder on PYTHONPATH whose sitecustomize calls `start`, in every Python
process under it. The first of them that imports transformers is recorded.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvtrace.errors import InputError, KvtraceError
from kvtrace_recorder.imports import AfterImport

VARIABLE = "KVTRACE_RECORD"
INJECT = Path(__file__).parent / "inject"


def run_command(command: Sequence[str], options: dict[str, Any]) -> int:
    """Run a command and record the first Python process in it that imports transformers.

    Parameters
    ----------
    command : sequence of str
        Looked up on PATH.
    options : dict
        Arguments of `record`, `path` included.

    Returns
    -------
    int
        The command's exit status; 128 + n where signal n ended it.

    Raises
    ------
    InputError
        Where there is no such command.
    """
    if shutil.which(command[0]) is None:
        raise InputError(
            f"{command[0]} was not found; SCRIPT.py, -m MODULE or a command on PATH was expected"
            " after `--`; check its name"
        )
    with tempfile.TemporaryDirectory(prefix="kvtrace-") as folder:
        given = {**options, "path": str(Path(options["path"]).absolute()), "claim": folder}
        held = os.environ.get("PYTHONPATH")
        environment = {
            **os.environ,
            VARIABLE: json.dumps(given),
            "PYTHONPATH": f"{INJECT}{os.pathsep}{held}" if held else str(INJECT),
        }
        child = subprocess.Popen(list(command), env=environment)
        # Ctrl-C reaches the child by the terminal; we only wait for how it ends.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            status = child.wait()
        finally:
            signal.signal(signal.SIGINT, before)
    return status if status >= 0 else 128 - status


def start() -> None:
    """Wait for transformers in this process; called by the injected sitecustomize."""
    text = os.environ.get(VARIABLE)
    if text:
        AfterImport("transformers.modeling_utils", lambda: _record(json.loads(text))).install()


def _record(options: dict[str, Any]) -> None:
    from kvtrace_recorder.session.recording import record

    try:
        claim = Path(options.pop("claim")) / "claimed"
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        recording = record(None, options.pop("path"), **options)
        recording.__enter__()
    except FileExistsError:
        print(
            f"kvtrace: process {os.getpid()} is not recorded: another one of this command is",
            file=sys.stderr,
        )
    except (KvtraceError, OSError) as error:
        print(f"kvtrace: not recorded: {error}", file=sys.stderr)
    else:
        _at_exit(lambda: _close(recording))


def _at_exit(call: Callable[[], None]) -> None:
    # Plain atexit is too late: by then zarr may start no thread any more. This is the list on
    # which concurrent.futures itself stands; the last to register is called first.
    register = getattr(threading, "_register_atexit", atexit.register)
    register(call)


def _close(recording: Any) -> None:
    # The interpreter leaves the exception that ended the program here.
    error = getattr(sys, "last_value", None)
    recording.__exit__(type(error) if error is not None else None, error, None)
