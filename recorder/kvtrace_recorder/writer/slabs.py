"""Memory that the model's process and the writer's both see, in slabs that are used again.

Anonymous files rather than named shared memory: nothing is left behind when a process dies, and
containers often give /dev/shm only 64 MB. A slab grows by no more than its size is rounded up,
and only a few free ones are kept.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

#: Slabs are at least this large, and a power of two up to `LARGE`.
SMALL = 1 << 20
LARGE = 32 << 20
#: Free slabs that are kept for the next batches, in bytes.
KEPT_BYTES = 32 << 20
#: Arrays begin at multiples of this: a cache line.
ALIGN = 64


class Arriving(Protocol):
    """Rows that are still on their way into a slab."""

    def add(self, target: Any, values: Any) -> None:
        """Let some values arrive in a piece of the slab."""

    def finish(self) -> None:
        """Wait until they are there."""


@dataclass(eq=False)
class Slab:
    """One piece of shared memory.

    Attributes
    ----------
    number : int
        Its name between the two processes.
    handle : int
        File descriptor.
    memory : mmap.mmap
        All of it.
    used : int
        Bytes that arrays stand in.
    charged : int
        Bytes that count against the queue while it is in use.
    arrival : Arriving or None
        What is on its way into it from a device.
    """

    number: int
    handle: int
    memory: mmap.mmap
    used: int = 0
    charged: int = 0
    arrival: Arriving | None = None
    address: int = field(init=False)

    def __post_init__(self) -> None:
        self.address = np.frombuffer(self.memory, np.uint8).__array_interface__["data"][0]

    @property
    def size(self) -> int:
        """Bytes of the slab."""
        return len(self.memory)

    def settle(self) -> None:
        """Wait until all that is on its way into it is there."""
        if self.arrival is not None:
            self.arrival.finish()
            self.arrival = None

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """The next bytes of the slab, aligned."""
        start = self.used
        self.used += room_for(nbytes)
        return np.frombuffer(self.memory, np.uint8, nbytes, start)


def room_for(nbytes: int) -> int:
    """Bytes that an array takes in a slab."""
    return -(-nbytes // ALIGN) * ALIGN


class SlabPool:
    """Makes slabs and takes them back; any thread."""

    def __init__(self) -> None:
        # A signal's handler may end the recording in the middle of this.
        self._lock = threading.RLock()
        self._free: dict[int, list[Slab]] = {}
        self._free_bytes = 0
        self._made = 0

    def get(self, nbytes: int) -> Slab:
        """A slab with room for so many bytes.

        Raises
        ------
        OSError
            Where the system gives no memory.
        """
        size = _rounded(nbytes)
        with self._lock:
            if self._free.get(size):
                self._free_bytes -= size
                slab = self._free[size].pop()
                slab.used, slab.arrival = 0, None
                return slab
            self._made += 1
            number = self._made
        handle = _anonymous_file(size)
        return Slab(number, handle, mmap.mmap(handle, size))

    def put(self, slab: Slab) -> bool:
        """Take a slab back; False where it is given up instead, and its descriptor closed."""
        with self._lock:
            if self._free_bytes + slab.size <= KEPT_BYTES:
                self._free.setdefault(slab.size, []).append(slab)
                self._free_bytes += slab.size
                return True
        # The mapping goes when the last array on it does.
        os.close(slab.handle)
        return False

    def close(self) -> None:
        """Give up the free slabs."""
        with self._lock:
            for slabs in self._free.values():
                for slab in slabs:
                    os.close(slab.handle)
            self._free = {}
            self._free_bytes = 0


def _rounded(nbytes: int) -> int:
    if nbytes >= LARGE:
        return -(-nbytes // LARGE) * LARGE
    return max(SMALL, 1 << (nbytes - 1).bit_length())


def _anonymous_file(size: int) -> int:
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create("kvtrace")
    else:
        with tempfile.TemporaryFile() as file:
            handle = os.dup(file.fileno())
    os.ftruncate(handle, size)
    return handle
