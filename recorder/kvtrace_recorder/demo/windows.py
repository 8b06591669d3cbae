"""Training windows from a stream of token ids, in an order that can be resumed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

BLOCK = 4096
"""Tokens in a block: the longest window. Shorter windows divide it."""


@dataclass
class Cursor:
    """How far the data has been read; saved with every checkpoint.

    Parameters
    ----------
    epoch
        Complete passes over the stream; seeds the order of its blocks.
    block
        Blocks of this epoch already used up.
    part
        Windows already taken from each block of the group in use.
    length
        Window length, in tokens, of the group in use.
    """

    epoch: int = 0
    block: int = 0
    part: int = 0
    length: int = 0

    def state(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


class Windows:
    """Batches of windows, every token used once per epoch.

    The stream is cut into blocks of `BLOCK` tokens, shuffled anew each epoch. A batch takes one
    window from each of ``batch_tokens / length`` blocks, so its windows are of different documents;
    the next batch continues in the same blocks until they are used up. Only then can the window
    length change.

    Parameters
    ----------
    stream
        Token ids ``[token]``.
    bos
        Id put in front of every window.
    batch_tokens
        Tokens per batch; a multiple of every window length.
    seed
        Seed of the block order.
    """

    def __init__(self, stream: NDArray[np.uint16], bos: int, batch_tokens: int, seed: int) -> None:
        if len(stream) < BLOCK:
            raise ValueError(
                f"the stream has {len(stream)} tokens; at least one block of {BLOCK} is needed;"
                " give a larger corpus"
            )
        self._blocks = stream[: len(stream) // BLOCK * BLOCK].reshape(-1, BLOCK)
        self._bos = bos
        self._batch_tokens = batch_tokens
        self._seed = seed
        self.cursor = Cursor()

    def next(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets ``[window, token]`` of the next batch.

        `length` is followed from the next group of blocks on. Inputs are BOS and all but the last
        token of each window, targets all of them.
        """
        at = self.cursor
        if at.part == 0:
            at.length = length
        count = min(max(1, self._batch_tokens // at.length), len(self._blocks))
        if at.block + count > len(self._blocks):
            at.epoch, at.block = at.epoch + 1, 0
        order = np.random.default_rng((self._seed, at.epoch)).permutation(len(self._blocks))
        rows = self._blocks[order[at.block : at.block + count]]
        start = at.part * at.length
        targets = torch.from_numpy(rows[:, start : start + at.length].astype(np.int64))
        at.part += 1
        if at.part * at.length >= BLOCK:
            at.part, at.block = 0, at.block + count
        inputs = torch.cat([torch.full((count, 1), self._bos), targets[:, :-1]], dim=1)
        return inputs, targets
