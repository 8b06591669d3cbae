"""What the `replay` verb says of a trace: the recorder never imports the policies themselves.

Both ways go through files, as everything between the two parts does.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import kvtrace
import kvtrace.cli
from kvtrace.errors import InputError
from kvtrace.model import Layer


@dataclass(frozen=True, eq=False)
class Reads:
    """What queries read that choose it, each for itself.

    Attributes
    ----------
    first_row : int
        The first of the queries; earlier ones read all.
    bits : mapping of int to uint8 [row, kv_head, byte]
        By layer: a bit a key, the query's own token included.
    kv_heads : mapping of int to list of int
        By layer: the model's numbers of those heads.
    """

    first_row: int
    bits: Mapping[int, NDArray[np.uint8]]
    kv_heads: Mapping[int, Sequence[int]]

    def of(self, layer: int, rows: slice, keys: int) -> NDArray[np.bool_]:
        """Whether the queries of some rows read a key: [kv_head of those kept, row, key]."""
        bits = self.bits[layer]
        found = np.ones((bits.shape[1], rows.stop - rows.start, keys), np.bool_)
        first = max(rows.start, self.first_row)
        if first < rows.stop:
            some = bits[first - self.first_row : rows.stop - self.first_row]
            read = np.unpackbits(some, axis=2, count=keys).astype(np.bool_)
            found[:, first - rows.start :] = read.transpose(1, 0, 2)
        return found


def evicted_at(path: Path, replay: Mapping[str, Any]) -> NDArray[np.int32]:
    """`evicted_at` [row, layer, kv_head] of a replay's policy on another trace."""
    _run(path, replay)
    trace = kvtrace.open(path)
    array = trace.replay(trace.replays()["replay"][0].as_py()).array("evicted_at")
    return np.asarray(array.read(0, trace.rows), np.int32)


def reads(path: Path, replay: Mapping[str, Any], request: int, layers: Sequence[Layer]) -> Reads:
    """What the queries of a request read by a replay's policy.

    Raises
    ------
    InputError
        Where the policy cannot be replayed, and where the trace lacks some of the queries.
    """
    with tempfile.TemporaryDirectory(prefix="kvtrace-reads-") as folder:
        file = Path(folder) / "reads.npz"
        _run(path, replay, "--no-store", "--request", str(request), "--reads", str(file))
        with np.load(file, allow_pickle=False) as arrays:
            rows = arrays["rows"]
            bits = {spec.layer: arrays[f"layer{spec.layer}"] for spec in layers}
    if (np.diff(rows) != 1).any() or any(len(of_layer) != len(rows) for of_layer in bits.values()):
        raise InputError(
            f"{path} lacks the queries of some rows that {replay['policy']} chooses by; those of"
            " all rows after the first cut were expected; record with --queries all"
        )
    return Reads(int(rows[0]), bits, {spec.layer: spec.kv_head_numbers for spec in layers})


def _run(path: Path, replay: Mapping[str, Any], *more: str) -> None:
    said = io.StringIO()
    arguments = [str(path), "--policy", replay["policy"], "--budget", replay["budget"]]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        status = kvtrace.cli.main(["replay", *arguments, "--when", replay["decide_when"], *more])
    if status:
        raise InputError(said.getvalue().strip().removeprefix("error: "))
