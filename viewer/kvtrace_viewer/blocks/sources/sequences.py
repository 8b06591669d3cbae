"""Requests one by one, put together to a block stream."""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.blocks.stream import BlockStream, dense_ids


@dataclass(frozen=True, eq=False)
class Sequence:
    """One request.

    Attributes
    ----------
    contents, tokens, is_output : numpy.ndarray
        [block]: any numbers that tell blocks apart, tokens in each, whether all are generated.
    arrival_ns, prompt_tokens : int
        When it came, and the tokens of its prompt.
    output_tokens : int
        Tokens that were generated and processed.
    request : int or None
        The trace's number of it, where it has one.
    end_ns : int or None
        When it had ended, where that is known.
    """

    contents: NDArray[np.int64]
    tokens: NDArray[Any]
    is_output: NDArray[np.bool_]
    arrival_ns: int
    prompt_tokens: int
    output_tokens: int = 0
    request: int | None = None
    end_ns: int | None = None


def stream_of(
    sequences: ListOf[Sequence], block_size: int, source: str, notes: tuple[str, ...] = ()
) -> BlockStream:
    """One stream of at least one request, in the order given."""
    blocks, number = dense_ids(np.concatenate([one.contents for one in sequences]))
    lengths = [len(one.contents) for one in sequences]
    return BlockStream(
        blocks=blocks,
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        tokens=np.concatenate([one.tokens for one in sequences]).astype(np.int32),
        is_output=np.concatenate([one.is_output for one in sequences]),
        arrival_ns=np.array([one.arrival_ns for one in sequences], np.int64),
        prompt_tokens=np.array([one.prompt_tokens for one in sequences], np.int64),
        block_size=block_size,
        num_blocks=number,
        request_ids=np.array(
            [one.request for one in sequences if one.request is not None], np.int64
        ),
        end_ns=np.array([one.end_ns for one in sequences if one.end_ns is not None], np.int64),
        output_tokens=np.array([one.output_tokens for one in sequences], np.int64),
        source=source,
        notes=notes,
    )
