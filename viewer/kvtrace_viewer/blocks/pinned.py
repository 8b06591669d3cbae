"""Pinned blocks: the first of every prompt have room of their own, under any policy.

The room is set aside from the start, as many blocks as are ever pinned, and the policy has the
rest. So no policy can evict a pinned block, and none has to know of them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from kvtrace.errors import InputError
from kvtrace_viewer.blocks.policy import HIT, MISS, UNREAD, BlockPolicy, Outcome
from kvtrace_viewer.blocks.stream import BlockStream


@dataclass(frozen=True)
class Pinned:
    """What was pinned in a run.

    Attributes
    ----------
    first : int
        The first so many blocks of every prompt are pinned.
    blocks : int
        Places set aside for them, at most the capacity.
    not_admitted : int
        Accesses of blocks that did not come in because every place is set aside for others.
    """

    first: int
    blocks: int
    not_admitted: int

    def to_json(self) -> dict[str, int]:
        """The same as plain values."""
        return asdict(self)


def check_pin(first: int, policies: list[BlockPolicy]) -> None:
    """Refuse fewer than 0 blocks, and a policy whose blocks cannot be pinned."""
    if first < 0:
        raise InputError(
            f"pin {first} is no number of blocks; 0 or more of a prompt's first blocks were"
            " expected; give --pin 4, say"
        )
    for policy in policies:
        if first and not policy.can_pin:
            raise InputError(
                f"{policy.name} cannot run with pinned blocks: it follows an allocator that has"
                " none, and holds the blocks of running requests itself; another policy was"
                " expected with --pin; leave one of the two out"
            )


def run_pinned(
    policy: BlockPolicy, stream: BlockStream, capacity: int, first: int
) -> tuple[Outcome, Pinned]:
    """Run a stream through a cache that never gives up the first blocks of a prompt.

    A block that is pinned in one prompt is pinned wherever it comes. Where more are pinned than
    the cache holds, those stay that come first, and no other block comes in.

    Parameters
    ----------
    policy : BlockPolicy
        What happens to the other blocks.
    stream : BlockStream
        The stream.
    capacity : int
        Blocks that the cache holds, pinned ones too.
    first : int
        Blocks of every prompt, at least 1.
    """
    pinned = np.zeros(stream.num_blocks, np.bool_)
    pinned[stream.blocks[(stream.index < first) & ~stream.is_output]] = True
    ids, firsts = np.unique(stream.blocks, return_index=True)
    seen_before = np.ones(stream.accesses, np.bool_)
    seen_before[firsts] = False
    in_order = ids[np.argsort(firsts)]
    places = min(capacity, int(np.count_nonzero(pinned)))
    placed = np.zeros(stream.num_blocks, np.bool_)
    placed[in_order[pinned[in_order]][:places]] = True
    is_pinned = placed[stream.blocks]
    hits = np.where(is_pinned & seen_before, HIT, MISS).astype(np.uint8)
    evictions, refused = 0, 0
    notes: tuple[str, ...] = ()
    if places < capacity:
        found = policy.run(stream.only(~is_pinned), capacity - places)
        hits[~is_pinned] = found.hits
        evictions, notes = found.evictions, found.notes
    else:
        refused = int(np.count_nonzero(~is_pinned))
    hits[~policy.reads(stream)] = UNREAD
    note = f"pinned: {places:,} of {capacity:,} blocks are set aside for the first {first} of every"
    note += " prompt"
    if refused:
        note += f", and {refused:,} accesses of others found no room: all misses, not admitted"
    return Outcome(hits, evictions, (*notes, note)), Pinned(first, places, refused)
