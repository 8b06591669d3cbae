"""Work started from the browser, one piece at a time, in a thread of its own."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from kvtrace.errors import InputError, KvtraceError
from kvtrace.trace import Trace

logger = logging.getLogger(__name__)
MAX_KEPT_JOBS = 50

Work = Callable[[Callable[[float], None]], list[str]]


@dataclass
class Job:
    """Running or finished work, such as a replay.

    Attributes
    ----------
    state
        "running", "done" or "failed".
    share
        Share done, 0 to 1.
    error
        One line, when failed.
    results
        Ids of the results, when done.
    """

    id: int
    state: str = "running"
    share: float = 0.0
    error: str | None = None
    results: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """What the browser polls."""
        return {
            "id": self.id,
            "state": self.state,
            "share": self.share,
            "error": self.error,
            "results": self.results,
        }


class ReplayJobs:
    """Starts replays and other work, and tells how far they are."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._jobs: dict[int, Job] = {}
        self._lock = threading.Lock()

    def start(
        self,
        trace: Trace,
        policies: list[str],
        budgets: list[str],
        when: str | None,
        requests: list[int] | None = None,
    ) -> Job:
        """Start a replay in the background, of all requests where none are named.

        Raises
        ------
        InputError
            When nothing was chosen, or another replay is still running.
        """
        if not policies:
            raise InputError("no policy chosen; expected at least one; pick a policy and run again")
        if not budgets:
            raise InputError('no budget given; expected tokens or a percentage; type "25%" or 128')
        chosen = partial(_replay, trace, policies, budgets, when, requests)
        return self.start_work("replay", chosen)

    def start_work(self, what: str, work: Work) -> Job:
        """Start any work in the background.

        Parameters
        ----------
        what : str
            What it is, for people.
        work : callable
            Told where to say the share done, 0 to 1; returns the names of its results.

        Raises
        ------
        InputError
            When something else is still running.
        """
        with self._lock:
            if any(job.state == "running" for job in self._jobs.values()):
                raise InputError(
                    "something is being computed already; one thing runs at a time; wait for it"
                )
            job = Job(next(self._ids))
            self._jobs[job.id] = job
            for old in list(self._jobs)[:-MAX_KEPT_JOBS]:
                del self._jobs[old]
        arguments = (job, what, work)
        threading.Thread(target=_run, args=arguments, daemon=True, name=f"{what}-{job.id}").start()
        return job

    def get(self, job_id: int) -> Job:
        """Look a job up."""
        job = self._jobs.get(job_id)
        if job is None:
            raise InputError(f"no job {job_id}; expected one started since the viewer was")
        return job


def _run(job: Job, what: str, work: Work) -> None:
    def progress(share: float) -> None:
        job.share = share

    try:
        job.results = work(progress)
        job.state = "done"
    except KvtraceError as error:
        job.error, job.state = str(error), "failed"
    except Exception as error:
        logger.exception("%s failed", what)
        job.error, job.state = f"the {what} failed: {error}", "failed"


def _replay(
    trace: Trace,
    policies: list[str],
    budgets: list[str],
    when: str | None,
    requests: list[int] | None,
    progress: Callable[[float], None],
) -> list[str]:
    # Imported here because it pulls in numba, which takes a second the first time.
    from kvtrace_viewer.replay import parse_policy, replay

    results = replay(
        trace,
        # A browser names policies; it must not name files, whose code would run.
        policies=[parse_policy(policy, files=False) for policy in policies],
        budgets=budgets,
        when=when,
        requests=requests,
        progress=progress,
    )
    return [result.id for result in results]
