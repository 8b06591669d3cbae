"""Record any program that runs a transformers model, unchanged.

The program runs as if it had been started directly; every transformers model it runs is recorded
from its first forward pass on. What follows `--`:

  SCRIPT.py ARGS     a script, run in this process
  -m MODULE ARGS     a module, likewise
  COMMAND ARGS       anything else that starts this Python, run as a child process

Example: kvtrace record --out run.kvtrace -- generate.py --prompt "Once upon a time"
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from kvtrace.writer import check_new_path
from kvtrace_recorder.child import run_command
from kvtrace_recorder.commands.options import add_recording_options
from kvtrace_recorder.commands.summary import summary
from kvtrace_recorder.launch import parse_program, run_program
from kvtrace_recorder.session.recording import record


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
    options: dict[str, Any] = {
        "detail": args.detail,
        "dtype": args.dtype,
        "force": args.force,
        "strict": args.strict,
        "on_full": args.on_full,
        "command": ["kvtrace", "record", "--", *words],
    }
    check_new_path(out, force=args.force)
    if program is None:
        status = run_command(words, {"path": str(out), **options})
    else:
        recording = record(None, out, **options)
        with recording:
            outcome = run_program(program)
            recording.complete = outcome.finished
        status = outcome.status
    print(summary(out, opened), file=sys.stderr)
    return status
