"""What a check found, and the status that says so."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any


class Status(IntEnum):
    """Exit statuses of `kvtrace check`; 1 and 2 are every verb's: an error, and misuse."""

    WHOLE = 0
    #: The recording ended early; what it committed is whole.
    CUT_OFF = 3
    #: What can be rebuilt differs: trace.duckdb, the manifest.
    DERIVED = 4
    #: What was recorded differs.
    DAMAGED = 5


WORDS = {
    Status.WHOLE: "whole",
    Status.CUT_OFF: "cut off: the recording ended early, what it committed is whole",
    Status.DERIVED: "derived files differ: nothing that was recorded is lost",
    Status.DAMAGED: "damaged",
}


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it was written.

    Attributes
    ----------
    status : Status
        What it means for the trace.
    path : str
        The file, relative to the trace.
    what : str
        What is wrong with it.
    lost : str
        What of the trace cannot be used for it; empty where nothing is lost.
    """

    status: Status
    path: str
    what: str
    lost: str = ""


@dataclass
class Report:
    """What a check found.

    Attributes
    ----------
    path : str
        The trace.
    problems : list of Problem
        In the order in which they were found.
    usable : list of str
        What can be read all the same.
    files, nbytes : int
        Whose checksums were compared.
    recording : bool
        Whether a process still writes; what it commits after the check began was not checked.
    """

    path: str
    problems: list[Problem] = field(default_factory=list)
    usable: list[str] = field(default_factory=list)
    files: int = 0
    nbytes: int = 0
    recording: bool = False

    @property
    def status(self) -> Status:
        """The worst of all."""
        return max((one.status for one in self.problems), default=Status.WHOLE)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        found = {**asdict(self), "status": self.status.name.lower(), "exit_status": self.status}
        for problem in found["problems"]:
            problem["status"] = problem["status"].name.lower()
        return found
