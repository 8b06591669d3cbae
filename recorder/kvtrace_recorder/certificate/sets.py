"""What was held and read in two runs, compared decision by decision."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtrace_recorder.certificate.replayed import Reads
from kvtrace_recorder.certificate.result import Columns

Evicted = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class KeptSets:
    """What a policy held, and what queries read of it where each chooses.

    Attributes
    ----------
    evicted_at : int32 [token, layer, kv_head]
    reads : Reads or None
    """

    evicted_at: Evicted
    reads: Reads | None = None

    def first_change(self, other: KeptSets) -> int | None:
        """Row of the first decision that differs; None where none does."""
        apart = self.evicted_at != other.evicted_at
        rows = [np.minimum(_last(self.evicted_at), _last(other.evicted_at))[apart]]
        if self.reads is not None and other.reads is not None:
            for layer, bits in self.reads.bits.items():
                differs = (bits != other.reads.bits[layer]).any(axis=(1, 2))
                # A query reads before it is decided what stays, and deeper layers read after it.
                rows.append(self.reads.first_row - 1 + np.flatnonzero(differs))
        changed = np.concatenate(rows)
        return int(changed.min()) if len(changed) else None


def first_measured(evicted_at: Evicted) -> int:
    """The first row that misses a key; the number of tokens where none does."""
    gone = evicted_at[evicted_at >= 0]
    return int(gone.min()) + 1 if len(gone) else len(evicted_at)


def events_apart(replayed: KeptSets, live: KeptSets, changed: int | None) -> Columns:
    """Columns of table `certificate_events`: Jaccard index of the sets of each decision.

    Parameters
    ----------
    changed : int or None
        The first decision that the last pass of the live run changed: from there on, nothing is
        settled but it itself.
    """
    settled_to = len(live.evicted_at) if changed is None else changed
    if replayed.reads is None or live.reads is None:
        rows, found = _of_held(replayed.evicted_at, live.evicted_at)
    else:
        rows, found = _of_reads(replayed.reads, live.reads)
    num_layers = found.shape[1]
    layers = (
        np.arange(num_layers) if replayed.reads is None else np.array(list(replayed.reads.bits))
    )
    return {
        "position": np.repeat(rows, num_layers),
        "layer": np.tile(layers, len(rows)),
        "jaccard": found.mean(axis=2).ravel(),
        "jaccard_worst": found.min(axis=2).ravel(),
        "is_exact": np.repeat(rows <= settled_to, num_layers),
    }


def _last(evicted_at: Evicted) -> Evicted:
    return np.where(evicted_at < 0, len(evicted_at), evicted_at)


def _of_held(replayed: Evicted, live: Evicted) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Decisions and their Jaccard indices [decision, layer, kv_head] of what is held after them."""
    tokens, num_layers, num_heads = replayed.shape
    a, b = _last(replayed), _last(live)
    rows = np.unique(np.concatenate([a[a < tokens], b[b < tokens]]))
    present = np.arange(1, tokens + 1)
    found = np.ones((len(rows), num_layers, num_heads))
    for layer in range(num_layers):
        for head in range(num_heads):
            both, either = (
                present - np.bincount(x, minlength=tokens + 1)[:tokens].cumsum()
                for x in (
                    np.minimum(a[:, layer, head], b[:, layer, head]),
                    np.maximum(a[:, layer, head], b[:, layer, head]),
                )
            )
            found[:, layer, head] = both[rows] / np.maximum(either[rows], 1)
    return rows.astype(np.int64), found


def _of_reads(replayed: Reads, live: Reads) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Rows and the Jaccard indices [row, layer, kv_head] of what their queries read."""
    layers = []
    for layer, a in replayed.bits.items():
        b = live.bits[layer]
        both, either = (np.bitwise_count(x).sum(axis=2, dtype=np.int64) for x in (a & b, a | b))
        layers.append(both / either)
    rows = replayed.first_row + np.arange(len(layers[0]))
    return rows, np.stack(layers, axis=1)
