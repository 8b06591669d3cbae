"""Which blocks must stay: the first of every prompt where pinned, those of requests in service."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from inspect import signature

import numpy as np

from kvtrace.errors import InputError
from kvtrace_viewer.blocks.guard import FOREVER, Guard, new_guard
from kvtrace_viewer.blocks.policy import REFUSED, BlockPolicy, Outcome
from kvtrace_viewer.blocks.stream import BlockStream, Counts, Ids
from kvtrace_viewer.replay.jit import jit

#: What `hold` takes instead of a number: from a request's begin to its end, as the stream tells.
SERVICE = "service"


@dataclass(frozen=True)
class Held:
    """What had to stay in a run.

    Attributes
    ----------
    pin : int
        The first so many blocks of every prompt are never evicted.
    hold : int or str
        So many requests hold their blocks at once; "service": those that were in service.
    most : int
        Blocks that had to stay at once, at most, had all come in.
    not_admitted : int
        Accesses of blocks that were not there and did not come in, since no other might go.
    """

    pin: int
    hold: int | str
    most: int
    not_admitted: int

    def to_json(self) -> dict[str, int | str]:
        """The same as plain values."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Holding:
    """What a stream's caches must keep, and when, whatever their policy.

    Attributes
    ----------
    pin, hold
        As `Held` has them.
    until : numpy.ndarray
        int64 [access], as `Guard` has it.
    ends : numpy.ndarray
        int64 [request], as `Guard` has it.
    most : int
        As `Held` has it.
    num_blocks : int
        Of the stream.
    """

    pin: int
    hold: int | str
    until: Counts
    ends: Counts
    most: int
    num_blocks: int

    def guard(self) -> Guard:
        """A guard for one run."""
        return new_guard(self.until, self.num_blocks, self.ends)

    def held(self, outcome: Outcome) -> Held:
        """What a run came to."""
        refused = int(np.count_nonzero(outcome.hits == REFUSED))
        return Held(self.pin, self.hold, self.most, refused)

    def note(self, held: Held, capacity: int) -> str:
        """The same in words."""
        said = []
        if self.pin:
            said.append(f"the first {self.pin} of every prompt for good")
        if self.hold == SERVICE:
            said.append("those of a request until it ended")
        elif self.hold:
            said.append(f"those of the last {self.hold} requests")
        text = f"never evicted: {', and '.join(said)}; {self.most:,} blocks at once at most"
        if held.not_admitted:
            text += (
                f"; {held.not_admitted:,} accesses were misses that did not come in at"
                f" {capacity:,}, since no other block might go"
            )
        return text


def holding_of(stream: BlockStream, pin: int = 0, hold: int | str = 0) -> Holding | None:
    """Find which blocks must stay; None where none must.

    Parameters
    ----------
    stream : BlockStream
        As it is replayed.
    pin : int
        Blocks of every prompt that are never evicted; a block that is pinned in one prompt is
        pinned wherever it comes, from then on.
    hold : int or str
        Requests that hold their blocks at once, the one that is served counted, 0: none does;
        "service": each holds them from its begin to its end, as the stream has them. A request
        holds its blocks for as long as its own accesses take at least.

    Raises
    ------
    InputError
        For numbers below 0, and for "service" where the stream does not say when requests ended.
    """
    if pin < 0:
        raise InputError(
            f"pin {pin} is no number of blocks; 0 or more of a prompt's first blocks were"
            " expected; give --pin 4, say"
        )
    if isinstance(hold, int) and hold < 0:
        raise InputError(
            f"hold {hold} is no number of requests; 0 or more, or {SERVICE}, were expected; give"
            " --hold 8, say"
        )
    if not pin and not hold:
        return None
    ends = _ends(stream, hold)
    until = np.arange(1, stream.accesses + 1)
    if hold:
        held_until = np.append(stream.starts[:-1], stream.accesses)[ends]
        until = np.repeat(held_until, np.diff(stream.starts))
    until[(stream.index < pin) & ~stream.is_output] = FOREVER
    most = int(_most(stream.blocks, until, stream.num_blocks))
    return Holding(pin, hold, until, ends, most, stream.num_blocks)


def takes_guard(policy: BlockPolicy) -> bool:
    """Whether a policy passes over blocks that must stay."""
    return all("guard" in signature(one).parameters for one in (policy.run, policy.simulate))


def check_holding(holding: Holding | None, policies: list[BlockPolicy]) -> None:
    """Refuse a policy that does not pass over blocks, where some must stay."""
    for policy in policies if holding else ():
        if not takes_guard(policy):
            raise InputError(
                f"{policy.name} cannot run where blocks must stay: its run or simulate takes no"
                " guard; one that passes over what must stay was expected (docs/blocks.md, Blocks"
                " that must stay); leave --pin and --hold out, or derive it from StepPolicy"
            )


def _ends(stream: BlockStream, hold: int | str) -> Counts:
    """The first request that comes after each has ended: int64 [request]; empty without hold."""
    count = stream.requests
    following = np.arange(1, count + 1)
    if hold == SERVICE:
        if not len(stream.end_ns):
            raise InputError(
                f"requests of this stream ({stream.source}) come with the time of their arrival"
                " alone, so nothing says how long they held their blocks; a recorded run was"
                f" expected with --hold {SERVICE}; give a number, --hold 8: requests in service"
                " at once"
            )
        return np.maximum(following, np.searchsorted(stream.arrival_ns, stream.end_ns))
    if isinstance(hold, str):
        raise InputError(
            f"hold {hold!r} is unknown; a number of requests or {SERVICE} was expected; give"
            " --hold 8, say"
        )
    return np.minimum(following - 1 + hold, count) if hold else np.empty(0, np.int64)


@jit
def _most(blocks: Ids, until: Counts, num_blocks: int) -> int:
    """Distinct blocks that must stay at once, at most."""
    stays = np.zeros(num_blocks, np.int64)
    freed = np.zeros(len(blocks) + 1, np.int64)
    now = 0
    most = 0
    for i in range(len(blocks)):
        now -= freed[i]
        before, after = stays[blocks[i]], max(stays[blocks[i]], until[i])
        if after > before:
            if before > i:
                if before <= len(blocks):
                    freed[before] -= 1
            else:
                now += 1
            if after <= len(blocks):
                freed[after] += 1
            stays[blocks[i]] = after
        most = max(most, now)
    return most
