"""What every query reads, of policies that choose it: a bit a key, kept only where asked for.

A cache that evicts is told by the row at which each slot went. What queries choose for themselves
has no shorter form than the choice of each, so it is as large as rows times keys, in bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace.errors import InputError
from kvtrace_viewer.replay.engine import HeadReplay


@dataclass(frozen=True, eq=False)
class Reads:
    """What the measured queries of one layer read, their own token included.

    Attributes
    ----------
    rows : int64 [row]
        Positions of the queries.
    bits : uint8 [row, kv_head, byte]
        A bit a key, key 0 the highest of byte 0; see `numpy.packbits`.
    """

    rows: NDArray[np.int64]
    bits: NDArray[np.uint8]


def layer_reads(heads: Sequence[HeadReplay]) -> dict[int, Reads]:
    """Reads of a layer whose replay kept them, by pair."""
    found: dict[int, Reads] = {}
    for r, run in enumerate(heads[0].runs):
        if not run.read_rows:
            continue
        rows = np.concatenate(run.read_rows)
        bits = np.stack([np.concatenate(head.runs[r].read_bits, axis=1) for head in heads], axis=2)
        found |= {run.columns.start + b: Reads(rows, of_budget) for b, of_budget in enumerate(bits)}
    return found


def write_reads(layers: Mapping[int, Reads], path: Path) -> None:
    """Write `rows` [row], and `layer<number>` [row, kv_head, byte] of every layer, as .npz.

    Raises
    ------
    InputError
        Where it cannot be written.
    """
    arrays: dict[str, Any] = {f"layer{layer}": reads.bits for layer, reads in layers.items()}
    rows = next((reads.rows for reads in layers.values()), np.empty(0, np.int64))
    try:
        with path.open("wb") as file:
            np.savez_compressed(file, rows=rows, **arrays)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}); --reads takes a file to write; "
            "choose another place"
        ) from error
