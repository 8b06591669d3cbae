"""A counting Bloom filter: how often something was seen, in little memory and never too low."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.jit import jit

Counters = NDArray[np.uint8]

#: Counters of one number; for one in a thousand counted too high among `entries` numbers.
_HASHES = 10
_ERROR = 0.001
#: What the two hash functions begin with: any numbers would do.
_SEEDS = (0x9E3779B97F5C0A28, 0xC2B2AE3D27E67962)


def new_sketch(entries: int) -> Counters:
    """A sketch for so many different numbers, all of them counted 0 times."""
    return np.zeros(max(1, math.ceil(-entries * math.log(_ERROR) / math.log(2) ** 2)), np.uint8)


@jit
def _mixed(number: int, seed: int) -> np.uint64:
    z = np.uint64(number) + np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@jit
def sketch_add(sketch: Counters, number: int) -> None:
    """Count a number once more."""
    at, step = _mixed(number, _SEEDS[0]), _mixed(number, _SEEDS[1]) | np.uint64(1)
    size = np.uint64(len(sketch))
    for _ in range(_HASHES):
        slot = at % size
        if sketch[slot] < 255:
            sketch[slot] += 1
        at += step


@jit
def sketch_count(sketch: Counters, number: int) -> int:
    """How often a number was counted, or more."""
    at, step = _mixed(number, _SEEDS[0]), _mixed(number, _SEEDS[1]) | np.uint64(1)
    size = np.uint64(len(sketch))
    least = 255
    for _ in range(_HASHES):
        least = min(least, sketch[at % size])
        at += step
    return least


@jit
def sketch_age(sketch: Counters) -> None:
    """Halve every counter, so that the past counts less."""
    for slot in range(len(sketch)):
        sketch[slot] >>= 1
