"""What a block policy is: a dataclass that runs a stream through a cache of so many blocks."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.blocks.guard import Guard
from kvtrace_viewer.blocks.stream import BlockStream, Ids

Hits = NDArray[np.uint8]

#: Values of `Outcome.hits`: the block was there, was not, was not asked for at all, or was not
#: there and found no room, since no other block might go.
HIT, MISS, UNREAD, REFUSED = 1, 0, 2, 3


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of each access.

    Attributes
    ----------
    hits : numpy.ndarray
        uint8 [access]: 1 hit, 0 miss, 2 not asked for by this policy, 3 miss that found no room.
    evictions : int
        Blocks evicted.
    notes : tuple of str
        What must be known to read the result, for people.
    """

    hits: Hits
    evictions: int
    notes: tuple[str, ...] = ()


def parameter(default: Any, text: str, unit: str = "", least: float | None = None) -> Any:
    """Declare a policy's parameter: its default, what it does, its unit, its least value."""
    return field(default=default, metadata={"help": text, "unit": unit, "least": least})


@dataclass(frozen=True, kw_only=True)
class BlockPolicy:
    """Which block a cache gives up when it is full.

    A policy is one file with one dataclass derived from this one. Its first docstring line is
    its idea and is shown to users; its fields, made with `parameter`, are what `--policy
    name:key=value` takes. Most policies define only `simulate`; one that must know the requests
    (which blocks belong together, which are of the prompt) overrides `run`.
    """

    name: ClassVar[str] = ""
    needs_full_blocks: ClassVar[bool] = False
    """Whether it never asks for a block that is not full."""

    def run(self, stream: BlockStream, capacity: int, guard: Guard | None = None) -> Outcome:
        """Run a stream through a cache of `capacity` blocks, empty at first.

        What `guard` says must stay is never evicted (`kvtrace_viewer.blocks.guard`); a policy
        whose `run` or `simulate` takes none is run only where nothing must.
        """
        hits = np.zeros(stream.accesses, np.uint8)
        if guard is None:
            evictions = self.simulate(stream.blocks, stream.num_blocks, capacity, hits)
        else:
            evictions = self.simulate(stream.blocks, stream.num_blocks, capacity, hits, guard)
        return Outcome(hits, evictions)

    def simulate(
        self,
        blocks: Ids,
        num_blocks: int,
        capacity: int,
        hits: Hits,
        guard: Guard | None = None,
    ) -> int:
        """Run accesses through a cache.

        Parameters
        ----------
        blocks : int32 [access]
            Dense ids, 0 to num_blocks - 1.
        num_blocks : int
            Distinct blocks.
        capacity : int
            Blocks that the cache holds, at least 1.
        hits : uint8 [access]
            To be set to 1 where the block was there, and to 3 where it was not and no other
            might go for it; zeros before.
        guard : Guard, optional
            What must not be evicted; None: anything may be.

        Returns
        -------
        int
            Evictions.
        """
        raise NotImplementedError

    def reads(self, stream: BlockStream) -> NDArray[np.bool_]:
        """Which accesses it asks for: bool [access]; those that it does not are no accesses."""
        return np.ones(stream.accesses, np.bool_)

    def parameters(self) -> dict[str, Any]:
        """Every parameter, defaults too, as plain values."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def spec(self) -> str:
        """The policy as `name:key=value,...`, defaults left out."""
        given = [
            f"{f.name}={_text(getattr(self, f.name))}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        return self.name + (":" + ",".join(given) if given else "")


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
