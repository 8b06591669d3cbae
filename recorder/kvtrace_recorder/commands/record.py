"""Record any program that runs a transformers model, or attends in plain PyTorch, unchanged.

The program runs as if it had been started directly; every transformers model it runs is recorded
from its first forward pass on, in whichever process under it: each process that runs a model gets
a rank of the trace (torchrun's own number where there is one). Where none runs, a model is whatever
torch.nn.Module the program itself calls and in which something attends. What follows `--`:

  SCRIPT.py ARGS     a script, run in this process
  -m MODULE ARGS     a module, likewise
  COMMAND ARGS       anything else that starts this Python, run as a child process

Example: kvtrace record --out run.kvtrace -- generate.py --prompt "Once upon a time"
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import kvtrace
from kvtrace.errors import TraceError
from kvtrace.manifest import Manifest
from kvtrace.ranks import discard_empty, make_trace
from kvtrace.version import __version__
from kvtrace_recorder.child import (
    VARIABLE,
    check_command,
    make_recording,
    recorded_environment,
    run_command,
)
from kvtrace_recorder.commands.options import add_recording_options, kept
from kvtrace_recorder.commands.summary import summary
from kvtrace_recorder.launch import Program, parse_program, run_program
from kvtrace_recorder.sigterm import end_on_sigterm

#: A writer that outlives its program has so long before the verb goes on without it.
SEALING_SECONDS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_recording_options(parser, out="default: traces/NAME-TIME.kvtrace")
    parser.add_argument(
        "--on-full",
        choices=("wait", "drop"),
        default="wait",
        help="while the disk is slower than the model: wait, or drop steps (default: wait)",
    )
    parser.add_argument(
        "--strict", action="store_true", help="let an error in the recorder reach the program"
    )
    parser.add_argument(
        "--sample-every",
        metavar="N",
        type=int,
        help="of a training: record one pass in N, the first sequence of its batch, and no other",
    )
    parser.add_argument(
        "program",
        nargs=argparse.REMAINDER,
        metavar="-- PROGRAM",
        help="SCRIPT.py ARGS, -m MODULE ARGS, or COMMAND ARGS",
    )


def run(args: argparse.Namespace) -> int:
    """Run the program and record it; its exit status."""
    words = args.program[1:] if args.program[:1] == ["--"] else args.program
    program = parse_program(words)
    name = program.name if program is not None else Path(words[0]).stem
    out = Path(args.out or f"traces/{name}-{time.strftime('%Y%m%d-%H%M%S')}.kvtrace")
    opened = out.absolute()
    command = ["kvtrace", "record", "--", *words]
    options: dict[str, Any] = {
        "path": str(opened),
        "launch": uuid4().hex,
        **kept(args),
        "strict": args.strict,
        "on_full": args.on_full,
        "sample_every": args.sample_every,
        "command": command,
    }
    if program is None:
        check_command(words[0])
    manifest = Manifest(__version__, time.time_ns(), "recorded", command, launch=options["launch"])
    make_trace(out, manifest, force=args.force)
    pid = os.getpid()
    if program is None:
        status = run_command(words, recorded_environment(options))
    else:
        status = _run_here(program, options)
    # A child that the program forked comes along here too.
    if os.getpid() == pid:
        _wait_until_sealed(opened)
        discard_empty(opened)
        print(summary(out, opened), file=sys.stderr)
    return status


def _wait_until_sealed(trace: Path) -> None:
    """Wait for the writers of processes that have just been killed; not for a detached one."""
    given_up = time.monotonic() + SEALING_SECONDS
    while time.monotonic() < given_up and _is_recording(trace):
        time.sleep(0.05)


def _is_recording(trace: Path) -> bool:
    try:
        return kvtrace.open(trace).status == "recording"
    except TraceError:
        # Nothing was recorded.
        return False


def _run_here(program: Program, options: dict[str, Any]) -> int:
    """Run a script or a module in this process; its children are recorded as a command's are."""
    before = dict(os.environ)
    os.environ.update(recorded_environment(options))
    try:
        recording = make_recording(options)
        undo = end_on_sigterm(lambda: recording.__exit__(None, None, None))
        try:
            with recording:
                outcome = run_program(program)
                recording.complete = outcome.finished
        finally:
            undo()
    finally:
        for name in (VARIABLE, "PYTHONPATH"):
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]
    return outcome.status
