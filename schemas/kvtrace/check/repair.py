"""Mending a trace: what is derived is built again, what is damaged is put aside."""

from __future__ import annotations

from pathlib import Path

from kvtrace import database
from kvtrace.check.report import Report
from kvtrace.layout import DATABASE


def repair(trace: Path, report: Report) -> list[str]:
    """Mend what `report` found; what was done, a line each."""
    done: list[str] = []
    if any(problem.path == DATABASE for problem in report.problems):
        database.build(trace)
        done.append(f"{DATABASE} was built again")
    return done
