"""Running a script, a module or a command as if it had been started directly."""

from __future__ import annotations

import io
import runpy
import shutil
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from kvtrace.errors import InputError

#: Where the standard library keeps the threads of its pools, and what tells them to end.
_POOLS = {
    "concurrent.futures.thread": ("_threads_queues", "_shutdown"),
    "concurrent.futures.process": ("_threads_wakeups", "_global_shutdown"),
}
#: Workers that zarr keeps for whoever reads or writes next in this process.
_STORAGE = ("zarr", "asyncio")
_OWN_FRAMES = (__file__, runpy.__file__, "<frozen runpy>")


@dataclass(frozen=True)
class Program:
    """What to run in this process.

    Attributes
    ----------
    kind : {"script", "module"}
        How Python was to run it.
    target : str
        Path of the script, or name of the module.
    arguments : tuple of str
        Its own arguments.
    """

    kind: str
    target: str
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """Short name, for a file name."""
        return Path(self.target).stem if self.kind == "script" else self.target.split(".")[-1]


@dataclass(frozen=True)
class Outcome:
    """How a program ended: its exit status, and whether it ran to its end."""

    status: int
    finished: bool


def parse_program(command: Sequence[str]) -> Program | None:
    """Recognise `SCRIPT.py ARGS`, `-m MODULE ARGS` and the same behind a plain `python`.

    Returns
    -------
    Program or None
        None for any other command, which needs a process of its own.

    Raises
    ------
    InputError
        Where there is nothing to run or the script does not exist.
    """
    words = list(command)
    if len(words) > 1 and _is_this_python(words[0]) and _is_program(words[1:]):
        words = words[1:]
    if not words:
        raise InputError(
            "no program was given; `-- SCRIPT.py ARGS` or `-- -m MODULE ARGS` was expected;"
            " see kvtrace record --help"
        )
    if words[0] == "-m":
        return _module(words)
    if not words[0].endswith(".py"):
        return None
    if not Path(words[0]).is_file():
        raise InputError(
            f"{words[0]} does not exist; a Python script was expected after `--`; check the path"
        )
    return Program("script", words[0], tuple(words[1:]))


def _module(words: Sequence[str]) -> Program:
    if len(words) < 2:
        raise InputError("-m was given without a module; `-- -m MODULE ARGS` was expected")
    return Program("module", words[1], tuple(words[2:]))


def _is_this_python(word: str) -> bool:
    if not Path(word).name.startswith("python"):
        return False
    found = shutil.which(word)
    return found is not None and Path(found).resolve() == Path(sys.executable).resolve()


def _is_program(words: Sequence[str]) -> bool:
    return words[0] == "-m" or words[0].endswith(".py")


def run_program(program: Program) -> Outcome:
    """Run it as `__main__`, with its own sys.argv and sys.path[0].

    Its traceback goes to standard error as Python would have printed it, without our frames, and
    its exit status is returned. All that is put back afterwards.
    """
    held = sys.argv, sys.path[:], sys.modules["__main__"]
    before = threading.enumerate()
    try:
        _run_as_main(program)
        wait_for_threads(before)
    except SystemExit as stop:
        return Outcome(_exit_status(stop.code), finished=True)
    except KeyboardInterrupt as error:
        _print_traceback(error)
        return Outcome(130, finished=False)
    except BaseException as error:  # noqa: BLE001 - whatever the program raises ends the program
        _print_traceback(error)
        return Outcome(1, finished=False)
    finally:
        sys.argv, sys.path[:], sys.modules["__main__"] = held
        _flush()
    return Outcome(0, finished=True)


def _run_as_main(program: Program) -> None:
    sys.argv = [program.target, *program.arguments]
    if program.kind == "module":
        sys.path[0] = str(Path.cwd())
        runpy.run_module(program.target, run_name="__main__", alter_sys=True)
        return
    # As the interpreter does: links resolved, so that a script finds what lies beside it.
    sys.path[0] = str(Path(program.target).resolve().parent)
    file = str(Path(program.target).absolute())
    main = ModuleType("__main__")
    main.__dict__.update(__file__=file, __builtins__=__builtins__, __spec__=None, __cached__=None)
    sys.modules["__main__"] = main
    with io.open_code(file) as opened:
        source = opened.read()
    exec(compile(source, file, "exec"), main.__dict__)  # noqa: S102 - the user's script


def wait_for_threads(before: Sequence[threading.Thread] = ()) -> None:
    """Wait as the interpreter does when a program ends: its threads may still run the model.

    Parameters
    ----------
    before : sequence of threading.Thread
        Threads that are not the program's.
    """
    known = {*before, threading.current_thread()}
    while True:
        pooled: set[threading.Thread] = set()
        for name, (workers, flag) in _POOLS.items():
            module = sys.modules.get(name)
            if module is not None:
                _end_pools(module, flag, _pools_of_program(getattr(module, workers), before))
                pooled |= set(getattr(module, workers))
        new = [x for x in threading.enumerate() if not x.daemon and x not in known | pooled]
        if not new:
            return
        for thread in new:
            thread.join()


def _pools_of_program(
    workers: Mapping[threading.Thread, Any], before: Sequence[threading.Thread]
) -> dict[threading.Thread, Any]:
    """Workers of pools that have none from before, and are not the trace's storage's."""
    items = list(workers.items())
    old = {id(waker) for thread, waker in items if thread in before}
    return {
        thread: waker
        for thread, waker in items
        if id(waker) not in old and not thread.name.startswith(_STORAGE)
    }


def _end_pools(module: ModuleType, flag: str, workers: dict[threading.Thread, Any]) -> None:
    """End the idle workers of pools that the program left: they end only when they are told.

    As the module's own exit handler does, but for these workers only, and pools work afterwards:
    this process goes on.
    """
    if not workers:
        return
    setattr(module, flag, True)
    try:
        for waker in workers.values():
            if hasattr(waker, "wakeup"):
                waker.wakeup()
            else:
                waker.put(None)
        for thread in workers:
            thread.join()
    finally:
        setattr(module, flag, False)


def _exit_status(code: Any) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)
    return 1


def _print_traceback(error: BaseException) -> None:
    hook = sys.excepthook
    try:
        shown = error.with_traceback(_without_own_frames(error.__traceback__))
        hook(type(shown), shown, shown.__traceback__)
    except BaseException:  # noqa: BLE001 - a broken hook must not hide the program's own error
        traceback.print_exception(error)


def _without_own_frames(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and trace.tb_frame.f_code.co_filename in _OWN_FRAMES:
        trace = trace.tb_next
    return trace


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
