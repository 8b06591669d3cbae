"""Whether a trace is what was written: `check` looks at every file, `repair` mends what it can."""

from kvtrace.check.repair import repair
from kvtrace.check.report import Problem, Report
from kvtrace.check.trace import check

__all__ = ["Problem", "Report", "check", "repair"]
