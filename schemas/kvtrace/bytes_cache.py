"""A cache bounded in bytes, for layers and tiles that were read or computed before."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class BytesCache(Generic[Value]):
    """Keeps the most recently used values, up to a number of bytes.

    A missing value is made once even when several threads ask for it together. A value larger
    than the whole cache is handed out and not kept.

    Parameters
    ----------
    max_bytes
        What the values may hold together.
    size_of
        Bytes that a value holds.
    """

    def __init__(self, max_bytes: int, size_of: Callable[[Value], int]) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._size_of = size_of
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._making: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Return the value of a key, made by `make` where it is not held."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                if key in self._values:
                    return self._values[key]
            try:
                value = make()
                self._keep(key, value)
            finally:
                with self._lock:
                    self._making.pop(key, None)
        return value

    def _keep(self, key: Hashable, value: Value) -> None:
        with self._lock:
            self._values[key] = value
            self.num_bytes += self._size_of(value)
            while self.num_bytes > self.max_bytes:
                _, dropped = self._values.popitem(last=False)
                self.num_bytes -= self._size_of(dropped)
