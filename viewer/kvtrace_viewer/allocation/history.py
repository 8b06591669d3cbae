"""What happened to the blocks of a pool, recorded or simulated: what all numbers are of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

#: Kinds of events. ALLOCATE: a free block is given to a request; SHARE: one that others hold, or
#: that is cached; FREE: a request lets go, and what nobody else holds is free; KEEP: a request
#: lets go, and what nobody else holds stays cached; EVICT: a cached block is free again.
ALLOCATE, SHARE, FREE, KEEP, EVICT = range(5)
KINDS = ("allocate", "share", "free", "keep", "evict")


@dataclass(frozen=True, eq=False)
class PoolHistory:
    """Events of the blocks of one pool, and the steps that used them.

    Moment k is when step k runs; moment `steps` is the end. Events of a moment came before it.

    Attributes
    ----------
    block_size, num_blocks, bytes_per_block, first_block : int
        Tokens of a block, blocks of the pool, bytes of a block (0: unknown), and the number of
        block 0 in the trace.
    moment, kind, request, block, index, ts_ns : int64 [event]
        In order. `request` is -1 where no request is concerned, `index` is the place in the
        request's block table, -1 where there is none.
    started_ns, duration_ns : int64 [step]
    part_step, part_request, part_past, part_count : int64 [part]
        The tokens that each step processed of each request: `part_count` after `part_past`.
    prompt_tokens, names, arrived_ns, arrival_step : mapping of int
        By request. `arrival_step`: the first step that could have processed it.
    notes : tuple of str
        What must be known to read it.
    """

    block_size: int
    num_blocks: int
    bytes_per_block: int
    moment: Ints
    kind: Ints
    request: Ints
    block: Ints
    index: Ints
    ts_ns: Ints
    started_ns: Ints
    duration_ns: Ints
    part_step: Ints
    part_request: Ints
    part_past: Ints
    part_count: Ints
    first_block: int = 0
    prompt_tokens: Mapping[int, int] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict)
    arrived_ns: Mapping[int, int] = field(default_factory=dict)
    arrival_step: Mapping[int, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """Steps that there were."""
        return len(self.started_ns)

    def tables_at(self, moment: int) -> dict[int, list[int]]:
        """Block tables at a moment: by request the blocks, in the order of the tokens."""
        tables: dict[int, dict[int, int]] = {}
        for at in range(int(np.searchsorted(self.moment, moment, side="right"))):
            kind, index = int(self.kind[at]), int(self.index[at])
            if index < 0:
                continue
            table = tables.setdefault(int(self.request[at]), {})
            if kind in (ALLOCATE, SHARE):
                table[index] = int(self.block[at])
            elif table.get(index) == self.block[at]:
                del table[index]
        return {
            request: [table[i] for i in sorted(table)] for request, table in tables.items() if table
        }


@dataclass
class EventLog:
    """Collects the events of a history."""

    rows: list[tuple[int, int, int, int, int]] = field(default_factory=list)

    def add(self, moment: int, kind: int, request: int, block: int, index: int) -> None:
        """Note one event; see `PoolHistory`."""
        self.rows.append((moment, kind, request, block, index))

    def columns(self) -> dict[str, Any]:
        """The events as arrays, without times."""
        table = np.array(self.rows, np.int64).reshape(-1, 5)
        names = ("moment", "kind", "request", "block", "index")
        return {name: np.ascontiguousarray(table[:, i]) for i, name in enumerate(names)}
