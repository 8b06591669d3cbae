"""Check that a trace is what was written, byte for byte, and say what is still usable.

Exit status: 0 whole; 3 cut off, all that was committed is whole; 4 only derived files differ;
5 something recorded differs. 1 is an error (no trace), 2 misuse.

--repair builds derived files again and moves what is damaged into the trace's folder quarantine/,
where nothing is ever deleted; what is lost by it becomes a row of table gaps.

Example: kvtrace check traces/demo.kvtrace
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from kvtrace.check import check, repair
from kvtrace.check.report import WORDS, Report
from kvtrace.console import console, human_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("trace", metavar="T", help="a .kvtrace directory")
    parser.add_argument(
        "--repair", action="store_true", help="mend what can be, put aside the rest"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")


def run(args: argparse.Namespace) -> int:
    """Check, perhaps repair, and print."""
    trace = Path(args.trace)
    report = check(trace)
    done: list[str] = []
    if args.repair and report.problems:
        done = repair(trace, report)
        report = check(trace)
    if args.json:
        print(json.dumps({**report.as_dict(), "repaired": done}))
    else:
        _show(report, done)
    return int(report.status)


def _show(report: Report, done: list[str]) -> None:
    out = console()
    for line in done:
        out.print(f"repaired  {line}", markup=False)
    for problem in report.problems:
        lost = f"; lost: {problem.lost}" if problem.lost else ""
        out.print(f"found     {problem.path}: {problem.what}{lost}", markup=False)
    for line in report.usable:
        out.print(f"usable    {line}", markup=False)
    state = "still recording, so far " if report.recording else ""
    out.print(
        f"{state}{WORDS[report.status]}: {report.files} files,"
        f" {human_bytes(report.nbytes)} compared with their checksums"
    )
