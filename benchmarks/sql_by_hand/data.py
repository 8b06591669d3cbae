"""What the questions are asked of: tables as columns, layers as arrays, in memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import kvtrace

Rows = list[tuple[Any, ...]]


class Data:
    """Tables as columns, layers as arrays; read once."""

    def __init__(self, trace: kvtrace.Trace) -> None:
        self.trace = trace
        self.table = cache(self._table)
        self.layer: Callable[[int], Any] = cache(lambda layer: trace.layer_data(layer, 0))

    def _table(self, name: str) -> dict[str, Any]:
        found = self.trace.sql(f"select * from {name}")
        return {c: found[c].to_numpy() for c in found.column_names}

    @cached_property
    def texts(self) -> dict[tuple[int, int], str]:
        t = self.table("request_tokens")
        names = zip(t["request"].tolist(), t["position"].tolist(), strict=True)
        return dict(zip(names, t["text"], strict=True))
