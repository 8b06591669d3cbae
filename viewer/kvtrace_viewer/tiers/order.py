"""Which block a tier gives up: every policy here is a key, and the block of least key goes.

LRU, FIFO, LFU, Belady and length-aware differ in nothing but the number they give a block when it
comes in or is used, so one heap serves them all.
"""

from __future__ import annotations

from kvtrace.errors import InputError
from kvtrace_viewer.replay.jit import jit

#: Name in `--policy`, and what it means.
ORDERS = {
    "lru": "the block whose last use is longest ago",
    "fifo": "the block that came in first",
    "lfu": "the block used least often since it came in, of several the one used longest ago",
    "length_aware": "as lfu, of several the one farthest from its sequence's begin",
    "belady": "the block whose next use is farthest away: knows the future",
}
LRU, FIFO, LFU, LENGTH_AWARE, BELADY = range(5)

_INDEX_BITS = 20
_COUNT_BITS = 40


def order_number(name: str) -> int:
    """Number of a policy, for the kernel.

    Raises
    ------
    InputError
        For an unknown name.
    """
    if name not in ORDERS:
        raise InputError(
            f"tier policy {name!r} is unknown; one of {', '.join(ORDERS)} was expected; kvtrace"
            " tiers --help explains them"
        )
    return list(ORDERS).index(name)


@jit
def key_of(order: int, access: int, came: int, uses: int, index: int, next_access: int) -> int:
    """Key of a block after an access of it; the least goes first.

    Parameters
    ----------
    order : int
        The policy.
    access, came : int
        Number of this access, and of the one that brought the block in.
    uses : int
        Times used since then.
    index : int
        Its index in the sequence.
    next_access : int
        Number of the next access of the block.
    """
    if order == LRU:
        return access
    if order == FIFO:
        return came
    if order == LFU:
        return (uses << _COUNT_BITS) + access
    if order == LENGTH_AWARE:
        return (uses << _INDEX_BITS) - index
    return -next_access
