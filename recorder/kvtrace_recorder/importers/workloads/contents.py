"""Block hashes of any source as 64-bit numbers."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

Contents = NDArray[np.int64]


def contents(hashes: Sequence[int | str], namespace: str | None) -> Contents:
    """Numbers of blocks: equal where the hashes and the namespaces are.

    A whole number of 64 bits stays as it is, hexadecimal text of 64 bits stands for its number,
    and anything else for 64 bits of its BLAKE2b. Among fifty million blocks two of those are
    alike with a probability of 1 in 15,000.

    Returns
    -------
    numpy.ndarray
        int64 [block].
    """
    try:
        found = np.array(hashes, dtype=np.int64)
    except (TypeError, ValueError, OverflowError):
        found = np.array([_number(one) for one in hashes], dtype=np.uint64).view(np.int64)
    return found if namespace is None else _mixed(found, namespace)


def _number(one: int | str) -> int:
    if isinstance(one, int):
        return one & 0xFFFFFFFFFFFFFFFF if -(1 << 63) <= one < 1 << 64 else _digest(str(one))
    text = one.removeprefix("0x")
    # int() takes signs, spaces and underscores, which are no hash's.
    if 0 < len(text) <= 16 and set(text.lower()) <= set("0123456789abcdef"):
        return int(text, 16)
    return _digest(one)


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "replace"), digest_size=8).digest())


def _mixed(found: Contents, namespace: str) -> Contents:
    """splitmix64 (Steele et al. 2014) of each number, from a start that the namespace gives."""
    z = found.view(np.uint64) + np.uint64(_digest(namespace))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))).view(np.int64)


def chained(hashes: Sequence[int | str]) -> list[int | str]:
    """Hashes of whole prefixes, from hashes of the blocks alone: 64 bits of BLAKE2b each."""
    found: list[int | str] = []
    before = 0
    for one in hashes:
        text = f"{before} {one}".encode("utf-8", "replace")
        before = int.from_bytes(blake2b(text, digest_size=8).digest(), signed=True)
        found.append(before)
    return found
