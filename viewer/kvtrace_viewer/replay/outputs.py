"""Errors of the attention output, for many pairs of policy and budget at once.

What a policy keeps at one budget it mostly keeps at a larger one, so few different sets of budgets
hold a key. The keys that the same budgets hold are one product of attention with values; each
budget adds up the products it holds. That is the work of one budget, not of eight.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.block import Block
from kvtrace_viewer.replay.cache import left_window
from kvtrace_viewer.replay.jit import jit
from kvtrace_viewer.replay.kernels import NEVER, told
from kvtrace_viewer.replay.vectors import COMPARED, lowest_bit

Bytes = NDArray[np.uint8]
Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]

PAIRS = 8
"""Pairs whose keys are told apart together, a bit each."""

ROWS = 16
"""Rows in one product: what is evicted between them is added back one by one."""


def output_errors(block: Block, evicted_at: Ints, pairs: Longs, rows: Longs) -> Doubles:
    """Relative output error ||o_S - o|| / ||o|| of some rows: float64 [pair, query head, row].

    o_S is renormalised over the kept keys (and a learned sink's share, where there is one).
    Which pairs are asked for together changes the error by its rounding, about 1e-6 of it.

    Parameters
    ----------
    evicted_at : int32 [pair, token]
    pairs : int64
        Which of them.
    rows : int64
        Index into the block, ascending.

    Raises
    ------
    ValueError
        Where the trace has no values.
    """
    errors = np.empty((len(pairs), block.head.group, len(rows)))
    values = _values_and_one(block)
    for r in range(0, len(rows), ROWS):
        some = rows[r : r + ROWS]
        for p in range(0, len(pairs), PAIRS):
            gone = evicted_at[pairs[p : p + PAIRS], : block.stop]
            if block.head.window is not None:
                # What the model drops itself it attends to no more: as good as held.
                by_model = left_window(block.head.tokens, block.head.window)[: block.stop]
                gone = np.where(gone == by_model, NEVER, gone)
            errors[p : p + PAIRS, :, r : r + ROWS] = _errors(block, values, gone, some)
    return errors


class FullOutputs:
    """The outputs of some rows of a block with the full cache, and errors against them."""

    def __init__(self, block: Block, rows: Longs) -> None:
        self.values = _values_and_one(block)
        self.sink = block.sink_share[:, rows]
        attention = np.ascontiguousarray(block.attention[:, rows])
        self.full = attention.reshape(-1, block.stop) @ self.values

    def errors(self, kept: Floats) -> Doubles:
        """||o_S - o|| / ||o|| where `kept` [query head, row, key] is what is left of the rows."""
        found = np.empty((1, *kept.shape[:2]))
        sums = kept.reshape(-1, kept.shape[2]) @ self.values
        _compare(np.stack([sums, self.full]), self.sink, found)
        return np.asarray(found[0])


def _values_and_one(block: Block) -> Floats:
    """[key, value_dim + 1]: one product gives the output and what it is renormalised by."""
    if block.head.v is None:
        raise ValueError("output error needs values")
    return block.head.values_and_one[: block.stop]


def _errors(block: Block, values: Floats, gone: Ints, rows: Longs) -> Doubles:
    """[pair, query head, row], of rows and pairs few enough for one product."""
    pairs, stop = gone.shape
    group, count = block.head.group, len(rows)
    last = block.start + int(rows[-1])
    holders, order = np.zeros(stop, np.uint8), np.empty(stop, np.int64)
    starts = np.zeros(2**PAIRS + 1, np.int64)
    _group_keys(gone, last, holders, order, starts)
    lines = np.empty((group * count, stop), np.float32)
    _take(block.attention, rows, order, lines)
    taken = values[order]
    sets = np.flatnonzero(np.diff(starts))
    sums = np.empty((len(sets), group * count, values.shape[1]), np.float32)
    for k, one in enumerate(sets):
        part = slice(starts[one], starts[one + 1])
        np.matmul(lines[:, part], taken[part], out=sums[k])
    adds = np.ones((pairs + 1, len(sets)), np.float32)  # the last line adds up all
    adds[:-1] = (sets >> np.arange(pairs)[:, None]) & 1
    outputs = (adds @ sums.reshape(len(sets), -1)).reshape(pairs + 1, *sums.shape[1:])
    outputs[adds.all(axis=1)] = outputs[-1]  # holds all, loses nothing: not even by rounding
    _add_back(block.attention, block.start, rows, gone, values, outputs)
    found = np.empty((pairs, group, count))
    _compare(outputs, block.sink_share[:, rows], found)
    return found


@jit
def _group_keys(gone: Ints, last: int, holders: Bytes, order: Longs, starts: Longs) -> None:
    """Sort keys by the set of pairs that hold them at row `last`, a bit a pair."""
    for p in range(gone.shape[0]):
        _add_holder(gone[p], last, np.uint8(1 << p), holders)
    for j in range(holders.shape[0]):
        starts[holders[j] + 1] += 1
    for k in range(1, starts.shape[0]):
        starts[k] += starts[k - 1]
    places = starts.copy()
    for j in range(holders.shape[0]):
        order[places[holders[j]]] = j
        places[holders[j]] += 1


@jit
def _add_holder(gone: Ints, last: int, bit: np.uint8, holders: Bytes) -> None:
    for j in range(gone.shape[0]):
        holders[j] |= bit if gone[j] >= last else np.uint8(0)


@jit
def _take(attention: Floats, rows: Longs, order: Longs, lines: Floats) -> None:
    """Write lines [query head * row, key]: some rows, their keys in order."""
    for g in range(attention.shape[0]):
        for r in range(rows.shape[0]):
            source, target = attention[g, rows[r]], lines[g * rows.shape[0] + r]
            for j in range(order.shape[0]):
                target[j] = source[order[j]]


@jit
def _add_back(
    attention: Floats, start: int, rows: Longs, gone: Ints, values: Floats, outputs: Floats
) -> None:
    """Add to outputs [pair, query head * row, value_dim + 1] what went before the last row."""
    count = rows.shape[0]
    first, last = start + rows[0], start + rows[count - 1] - 1
    for p in range(gone.shape[0]):
        for begin in range(0, gone.shape[1], COMPARED):
            places = told(gone[p], begin, first, last)
            while places != np.uint64(0):
                j = begin + lowest_bit(places)
                places &= places - np.uint64(1)
                for r in range(count):
                    if start + rows[r] > gone[p, j]:
                        break
                    for g in range(attention.shape[0]):
                        _add_value(outputs[p, g * count + r], attention[g, rows[r], j], values[j])


@jit
def _add_value(output: Floats, share: np.float32, value: Floats) -> None:
    for d in range(value.shape[0]):
        output[d] += share * value[d]


@jit
def _compare(outputs: Floats, sink: Doubles, errors: Doubles) -> None:
    """Write errors [pair, query head, row] of outputs [pair + 1, ...], the last the full one.

    A row that keeps nothing has no output to speak of: zero, as the sum of no values.
    """
    pairs, group, count = errors.shape
    dims = outputs.shape[2] - 1
    full = np.empty(dims)
    for g in range(group):
        for r in range(count):
            size = 0.0
            _renormalise(outputs[pairs, g * count + r], sink[g, r], full)
            for d in range(dims):
                size += full[d] * full[d]
            for p in range(pairs):
                apart = _apart(outputs[p, g * count + r], sink[g, r], full)
                errors[p, g, r] = np.sqrt(apart / size) if size > 0 else 0.0


@jit
def _renormalise(output: Floats, sink: float, full: Doubles) -> None:
    total = output[-1] + sink
    share = 1.0 / total if total > 0 else 1.0
    for d in range(full.shape[0]):
        full[d] = output[d] * share


@jit
def _apart(output: Floats, sink: float, full: Doubles) -> float:
    """Square of the distance of a renormalised output from the full one."""
    total = output[-1] + sink
    share = 1.0 / total if total > 0 else 1.0
    found = 0.0
    for d in range(full.shape[0]):
        apart = output[d] * share - full[d]
        found += apart * apart
    return found
