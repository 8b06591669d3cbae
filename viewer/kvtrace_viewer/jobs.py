"""Replays started from the browser, one at a time, in a thread of their own."""

from __future__ import annotations

import itertools
import logging
import threading
from dataclasses import dataclass, field
from typing import Any

from kvtrace.errors import InputError, KvtraceError
from kvtrace.trace import Trace

logger = logging.getLogger(__name__)
MAX_KEPT_JOBS = 50


@dataclass
class Job:
    """A running or finished replay.

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
    """Starts replays and tells how far they are."""

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
        with self._lock:
            if any(job.state == "running" for job in self._jobs.values()):
                raise InputError("a replay is running already; one runs at a time; wait for it")
            job = Job(next(self._ids))
            self._jobs[job.id] = job
            for old in list(self._jobs)[:-MAX_KEPT_JOBS]:
                del self._jobs[old]
        arguments = (job, trace, policies, budgets, when, requests)
        threading.Thread(target=_run, args=arguments, daemon=True, name=f"replay-{job.id}").start()
        return job

    def get(self, job_id: int) -> Job:
        """Look a job up."""
        job = self._jobs.get(job_id)
        if job is None:
            raise InputError(f"no replay job {job_id}; expected one started since the viewer was")
        return job


def _run(
    job: Job,
    trace: Trace,
    policies: list[str],
    budgets: list[str],
    when: str | None,
    requests: list[int] | None,
) -> None:
    def progress(share: float) -> None:
        job.share = share

    try:
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
        job.results = [result.id for result in results]
        job.state = "done"
    except KvtraceError as error:
        job.error, job.state = str(error), "failed"
    except Exception as error:
        logger.exception("replay failed")
        job.error, job.state = f"the replay failed: {error}", "failed"
