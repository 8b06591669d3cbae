"""Recording every Python process under `kvtrace record`, each into a rank of one trace.

The program runs with a folder on PYTHONPATH whose sitecustomize calls `start`, in every Python
process under it; those that run a model are recorded. Every process that
the program starts imports this module: it imports nothing heavy itself.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtrace_recorder.first_call import FirstCall
from kvtrace_recorder.imports import AfterImport
from kvtrace_recorder.sigterm import end_on_sigterm

if TYPE_CHECKING:
    from kvtrace_recorder.session.recording import Recording

VARIABLE = "KVTRACE_RECORD"
INJECT = Path(__file__).parent / "inject"
#: What ends a command from outside; Ctrl-C reaches it by the terminal.
_FORWARDED = (signal.SIGTERM, signal.SIGHUP)


def recorded_environment(options: Mapping[str, Any]) -> dict[str, str]:
    """Environment variables under which the Python processes of a program are recorded.

    Parameters
    ----------
    options : mapping
        As of `make_recording`.
    """
    held = os.environ.get("PYTHONPATH")
    return {
        VARIABLE: json.dumps(options),
        "PYTHONPATH": f"{INJECT}{os.pathsep}{held}" if held else str(INJECT),
    }


def run_command(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command and wait for its end, passing on what is meant for it.

    Parameters
    ----------
    command : sequence of str
        Looked up on PATH.
    environment : mapping of str to str
        Set in addition to this process's.

    Returns
    -------
    int
        The command's exit status; 128 + n where signal n ended it.
    """
    child = subprocess.Popen(list(command), env={**os.environ, **environment})
    with _forwarding(child):
        status = child.wait()
    return status if status >= 0 else 128 - status


def check_command(name: str) -> None:
    """Refuse a command that is not on PATH.

    Raises
    ------
    InputError
        With what was expected.
    """
    from kvtrace.errors import InputError

    if shutil.which(name) is None:
        raise InputError(
            f"{name} was not found; SCRIPT.py, -m MODULE or a command on PATH was expected"
            " after `--`; check its name"
        )


def start() -> None:
    """Wait for a model in this process; called by the injected sitecustomize."""
    text = os.environ.get(VARIABLE)
    if not text:
        return

    made: list[Any] = []

    def heed_sigterm() -> None:
        end_on_sigterm(lambda: [recording.__exit__(None, None, None) for recording in made])

    def begin() -> None:
        called.remove()
        imported.remove()
        heed_sigterm()
        made.extend(_record(json.loads(text)))

    called = FirstCall(begin)
    imported = AfterImport("transformers.modeling_utils", begin)
    called.install()
    imported.install()
    # A server has taken SIGTERM, to raise it again for whoever had it before, by the time that it
    # loads a model; and it does that in another thread.
    AfterImport("transformers", heed_sigterm).install()


def make_recording(options: Mapping[str, Any]) -> Recording:
    """The recording of this process, to be entered.

    Parameters
    ----------
    options : mapping
        Arguments of `record`, `path` and `launch` included; and `sample_every`, a number or None.
    """
    from kvtrace_recorder.session.recording import record

    given = dict(options)
    every = given.pop("sample_every")
    launch = given.pop("launch")
    recording = record(None, **given)
    recording.join(launch, on_fork=start)
    if every is not None:
        recording.sample(every)
    return recording


def _record(options: dict[str, Any]) -> list[Recording]:
    from kvtrace.errors import KvtraceError

    try:
        recording = make_recording(options)
        recording.__enter__()
    except (KvtraceError, OSError) as error:
        print(f"kvtrace: not recorded: {error}", file=sys.stderr)
        return []
    _at_exit(lambda: _close(recording))
    return [recording]


def _at_exit(call: Callable[[], None]) -> None:
    # Plain atexit does not run in the children of multiprocessing. This is the list on which
    # concurrent.futures itself stands; the last to register is called first.
    register = getattr(threading, "_register_atexit", atexit.register)
    register(call)


def _close(recording: Any) -> None:
    from kvtrace_recorder.launch import wait_for_threads

    wait_for_threads()
    # The interpreter leaves the exception that ended the program here.
    error = getattr(sys, "last_value", None)
    recording.__exit__(type(error) if error is not None else None, error, None)


@contextmanager
def _forwarding(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """While the command runs, Ctrl-C is its own business and other endings go to it."""

    def forward(number: int, frame: object) -> None:
        child.send_signal(number)

    before: dict[int, Any] = {number: signal.signal(number, forward) for number in _FORWARDED}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
