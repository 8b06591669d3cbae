"""The same tokens through the model, with its full cache and with kept sets enforced.

Both runs take the tokens in the same chunks, so that they differ by what was evicted alone, and
no more than a chunk's masks and logits is held.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from kvtrace.model import Layer
from kvtrace.rope import Rope
from kvtrace_recorder.certificate.enforce import Attending, See
from kvtrace_recorder.certificate.replayed import Reads
from kvtrace_recorder.certificate.result import Columns

CHUNK_ROWS = 256
CHUNK_CELLS = 2**24
"""Cells of a chunk's largest matrix: a layer's mask over heads and keys, or its logits."""


@dataclass
class EnforcedRun:
    """One run with keys hidden, from its first measured row on.

    Attributes
    ----------
    evicted_at : mapping of int to torch.Tensor
        As `Attending` takes it.
    first_row : int
        The first row that can miss a key; the rows before are the full cache's.
    see : callable, optional
        Shown every attention call of the rows from `first_row` on.
    ropes : mapping of int to Rope, optional
        As `Attending` takes them.
    reads : Reads, optional
        As `Attending` takes them.
    """

    evicted_at: Mapping[int, torch.Tensor]
    first_row: int
    see: See | None = None
    ropes: Mapping[int, Rope] | None = None
    reads: Reads | None = None
    _cache: Any = None
    _parts: list[Columns] = field(default_factory=list)

    @property
    def steps(self) -> Columns:
        """Columns of table `certificate_steps`."""
        names = self._parts[0]
        return {name: np.concatenate([part[name] for part in self._parts]) for name in names}

    def take(
        self, model: Any, ids: torch.Tensor, layers: Mapping[int, Layer], rows: slice, full: Any
    ) -> None:
        """Run some rows, and compare with the full cache's logits [row, vocabulary]."""
        hook = Attending(layers, self.evicted_at, self.see, self.ropes, self.reads)
        logits = forward(model, ids[:, rows], self._cache, hook)
        following = ids[0, rows.start + 1 : rows.stop + 1]
        self._parts.append(
            {"position": np.arange(rows.start, rows.stop), **compare(full, logits, following)}
        )

    def fork(self, cache: Any) -> None:
        """Go on from the full run's cache of the rows before `first_row`."""
        self._cache = copy.deepcopy(cache)


def teacher_forced(
    model: Any,
    ids: torch.Tensor,
    layers: Mapping[int, Layer],
    runs: Sequence[EnforcedRun],
    see: See | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> None:
    """Run the same tokens with the full cache and under each of `runs`.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        In evaluation mode.
    ids : torch.Tensor
        [1, token].
    layers : mapping of int to Layer
        See `Attending`.
    runs : sequence of EnforcedRun
        Their `steps` are filled.
    see : callable, optional
        Shown every attention call of the run with the full cache.
    progress : callable, optional
        Told the share done, 0 to 1.
    """
    tokens = ids.shape[1]
    cache = DynamicCache()
    for rows in chunks(model, tokens, layers, [run.first_row for run in runs]):
        for run in runs:
            if run.first_row == rows.start:
                run.fork(cache)
        hook = Attending(layers, see=see)
        full = forward(model, ids[:, rows], cache, hook)
        hook.check()
        for run in runs:
            if run.first_row <= rows.start:
                run.take(model, ids, layers, rows, full)
        progress(rows.stop / tokens)


def forward(model: Any, ids: torch.Tensor, cache: Any, hook: Attending) -> torch.Tensor:
    """Logits [row, vocabulary] of the next rows; the cache grows by them."""
    rows = ids.shape[1] if hook.ropes is None else 1
    parts = [ids[:, at : at + rows] for at in range(0, ids.shape[1], rows)]
    with torch.no_grad(), hook:
        logits = [
            model(input_ids=part, past_key_values=cache, use_cache=True).logits[0] for part in parts
        ]
    return torch.cat(logits)


def chunks(
    model: Any, tokens: int, layers: Mapping[int, Layer], starts: Sequence[int]
) -> Iterator[slice]:
    """Rows to run at a time; a chunk begins at each of `starts`."""
    heads = max(spec.num_q_heads for spec in layers.values())
    widest = max(heads * tokens, model.get_output_embeddings().weight.shape[0])
    height = int(np.clip(CHUNK_CELLS // widest, 1, CHUNK_ROWS))
    edges = sorted({0, tokens, *(start for start in starts if start < tokens)})
    for first, last in itertools.pairwise(edges):
        for start in range(first, last, height):
            yield slice(start, min(start + height, last))


def compare(full: torch.Tensor, evicted: torch.Tensor, following: torch.Tensor) -> Columns:
    """Compare two runs' logits [row, vocabulary], in float64.

    Returns
    -------
    columns of table `certificate_steps`
        `nll_full` and `nll_evicted` are NaN in rows that no recorded token follows.
    """
    p, q = (x.double().log_softmax(dim=1) for x in (full, evicted))
    terms = torch.where(p > -torch.inf, p.exp() * (p - q), 0)
    nll = {}
    for name, x in (("nll_full", p), ("nll_evicted", q)):
        values = np.full(len(x), np.nan)
        taken = x[: len(following)].gather(1, following[:, None])[:, 0]
        values[: len(following)] = -taken.cpu().numpy()
        nll[name] = values
    agrees = full.argmax(dim=1) == evicted.argmax(dim=1)
    # Rounding can leave -1e-17 of two equal distributions.
    kl = terms.sum(dim=1).clamp(min=0)
    return {"kl": kl.cpu().numpy(), **nll, "agrees": agrees.cpu().numpy()}


class KeyCheck:
    """How far the model's keys are from the recorded ones: whether it is the model recorded.

    Parameters
    ----------
    recorded : mapping of int to numpy.ndarray
        By layer: [token, kv_head, head_dim], NaN where not held.
    numbers : mapping of int to list of int
        By layer: the model's numbers of those KV heads.
    """

    def __init__(
        self, recorded: Mapping[int, NDArray[np.float32]], numbers: Mapping[int, list[int]]
    ) -> None:
        self._recorded, self._numbers = recorded, numbers
        self._sums = {layer: np.zeros(2) for layer in recorded}

    def see(self, layer: int, call: Any) -> None:
        """Compare the keys of a call's rows."""
        if layer not in self._recorded:
            return
        own, first = new_rows(call.k, call.q.shape[2])
        own = own[:, self._numbers[layer]]
        recorded = self._recorded[layer][first : first + len(own)]
        held = np.isfinite(recorded)
        apart = np.where(held, own - recorded, 0)
        self._sums[layer] += (apart**2).sum(), np.where(held, recorded**2, 0).sum()

    @property
    def error(self) -> float:
        """The worst layer's ||k - recorded|| / ||recorded||."""
        return max(
            float(np.sqrt(apart / size)) if size else 0.0 for apart, size in self._sums.values()
        )


def new_rows(values: torch.Tensor, rows: int) -> tuple[NDArray[np.float32], int]:
    """The last `rows` of [1, head, token, width] as [row, head, width], and which is the first."""
    first = values.shape[2] - rows
    return values[0, :, first:].transpose(0, 1).float().cpu().numpy(), first
