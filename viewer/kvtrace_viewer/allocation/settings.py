"""What a simulated server is set to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kvtrace.errors import InputError
from kvtrace_viewer.allocation.pool import POLICIES

#: Which of the waiting requests is begun first.
ADMISSIONS = {
    "fcfs": "in the order in which they came",
    "shortest_prompt": "the shortest prompt first",
    "shortest_job": "the fewest tokens in all first, as if their answers' lengths were known",
    "longest_job": "the most tokens in all first",
}
#: What becomes of a request that has to give its blocks up.
PREEMPTIONS = {
    "recompute": "its tokens are processed again",
    "swap": "its blocks are copied out and back; without room there, recompute",
}
#: Which of the running requests come first in a step.
SCHEDULERS = {
    "fifo": "those that decode, then those whose prompt is being processed",
    "prefill_first": "the other way round",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One server.

    Attributes
    ----------
    block_size : int
        Tokens of a block.
    pool : int
        Blocks.
    max_batch : int
        Requests that a step processes.
    max_batch_tokens : int
        Tokens that a step processes; longer prompts are processed in parts.
    admission, policy, preempt, scheduler : str
        Of `ADMISSIONS`, `POLICIES`, `PREEMPTIONS`, `SCHEDULERS`.
    swap_blocks : int
        Blocks that fit where preempted requests are copied to.
    safety_margin : float
        Share of the pool that must be free for more than one prompt to be begun or gone on with.
    """

    block_size: int
    pool: int
    max_batch: int
    max_batch_tokens: int
    admission: str = "fcfs"
    policy: str = "all"
    preempt: str = "recompute"
    scheduler: str = "fifo"
    swap_blocks: int = 0
    safety_margin: float = 0.15

    def __post_init__(self) -> None:
        for name in ("block_size", "pool", "max_batch", "max_batch_tokens"):
            value = getattr(self, name)
            if value < 1:
                raise InputError(
                    f"{_option(name)} is {value}; a number of at least 1 was expected; give another"
                )
        for name, known in (
            ("admission", ADMISSIONS),
            ("policy", POLICIES),
            ("preempt", PREEMPTIONS),
            ("scheduler", SCHEDULERS),
        ):
            if getattr(self, name) not in known:
                raise InputError(
                    f"{_option(name)} {getattr(self, name)!r} is unknown; one of"
                    f" {', '.join(known)} was expected; choose one"
                )
        if not 0 <= self.safety_margin <= 1:
            raise InputError(
                f"the safety margin is {self.safety_margin}; a share from 0 to 1 was expected;"
                " give another"
            )

    def to_json(self) -> dict[str, Any]:
        """The settings as plain values."""
        return asdict(self)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
