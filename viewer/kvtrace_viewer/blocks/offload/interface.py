"""The part of vLLM's `CachePolicy` that a policy fills in, so that ours can be run without vLLM.

After vllm.v1.kv_offload.cpu.policies.base (experimental there). A block is vLLM's: `ref_cnt` is
above 0 while a transfer reads it, and below 0 until it may be read; only at 0 it can go.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any


class CachePolicy(ABC):
    """What blocks are there, and which goes next."""

    @abstractmethod
    def __init__(self, cache_capacity: int) -> None:
        """Begin empty, for a cache of so many blocks."""

    @abstractmethod
    def get(self, key: Any) -> Any:
        """Return the block of a key, or None."""

    @abstractmethod
    def insert(self, key: Any, block: Any) -> None:
        """Add a block that was newly allocated."""

    @abstractmethod
    def remove(self, key: Any) -> None:
        """Take out a block whose store failed."""

    @abstractmethod
    def touch(self, keys: Iterable[Any], req_context: Any = None) -> None:
        """Note that blocks were used."""

    @abstractmethod
    def evict(self, n: int, protected: set[Any]) -> list[tuple[Any, Any]] | None:
        """Evict exactly n blocks, none of them protected; None, and nothing done, where not."""

    @abstractmethod
    def clear(self) -> None:
        """Take out every block."""
