"""A request on its way through a simulated server, and what a simulation gives."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvtrace_viewer.allocation.history import EventLog
from kvtrace_viewer.allocation.settings import Settings
from kvtrace_viewer.allocation.workload import Asked


@dataclass(eq=False)
class Job:
    """A request on its way.

    Attributes
    ----------
    asked : Asked
        The request.
    contents : list of int
        Of its full blocks.
    target : int
        Tokens to process before the next answer token: the prompt, and what was generated before
        a preemption.
    position, generated : int
        Tokens processed (and cached); answer tokens made.
    state : str
        waiting, prefilling or decoding.
    table : list of int
        Its blocks.
    swapped : int
        Blocks that were copied out.
    first_step, end_step : int or None
        When it was first processed, and done.
    preemptions, recomputed, found : int
        Times it gave its blocks up; tokens processed again; tokens found in cached blocks.
    """

    asked: Asked
    contents: list[int]
    target: int
    position: int = 0
    generated: int = 0
    state: str = "waiting"
    table: list[int] = field(default_factory=list)
    swapped: int = 0
    first_step: int | None = None
    end_step: int | None = None
    preemptions: int = 0
    recomputed: int = 0
    found: int = 0

    @property
    def pending(self) -> int:
        """Tokens that it could process now."""
        return self.target - self.position


@dataclass(eq=False)
class Simulation:
    """A run: what happened, and to whom.

    Attributes
    ----------
    settings : Settings
        Of the server.
    jobs : list of Job
        Those that were served, in the order in which they came.
    refused : dict
        Why others were not, by request.
    log : EventLog
        Events of blocks.
    parts : list of (step, request, past, count)
        What each step processed.
    clock : list of int
        The recorded step that each step stands for: it runs on where the server was idle.
    swapped_out : int
        Blocks that were copied out.
    """

    settings: Settings
    jobs: list[Job]
    refused: dict[int, str]
    log: EventLog
    parts: list[tuple[int, int, int, int]] = field(default_factory=list)
    clock: list[int] = field(default_factory=list)
    swapped_out: int = 0
