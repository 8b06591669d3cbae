"""Block streams for tests."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import kvtrace
import kvtrace.cli
from kvtrace_viewer.blocks import BlockStream, read_stream

REFERENCE = Path(__file__).parents[1] / "reference"
#: Published by others, so no part of this project; beside it where its data is kept.
_BESIDE = (
    Path(__file__).parents[3].joinpath("shared", "data", "mooncake", "conversation_trace.jsonl")
)
MOONCAKE = Path(os.environ.get("KVTRACE_MOONCAKE", _BESIDE))

needs_mooncake = pytest.mark.skipif(
    not MOONCAKE.exists(), reason="no Mooncake trace (KVTRACE_MOONCAKE; docs/blocks.md says where)"
)


def stream_of(blocks: Sequence[int], length: int = 5, last_tokens: int = 16) -> BlockStream:
    """A synthetic stream: requests of `length` blocks of 16 tokens, the last of each in part."""
    found, ids = np.unique(np.array(blocks, np.int64), return_inverse=True)
    count = len(ids)
    starts = np.array([*range(0, count, length), count])
    tokens = np.full(count, 16, np.int32)
    tokens[starts[1:] - 1] = last_tokens
    return BlockStream(
        blocks=ids.astype(np.int32),
        starts=starts,
        tokens=tokens,
        is_output=np.zeros(count, np.bool_),
        arrival_ns=np.arange(len(starts) - 1),
        prompt_tokens=np.add.reduceat(tokens, starts[:-1]).astype(np.int64),
        block_size=16,
        num_blocks=len(found),
    )


def imported(source: Path, folder: Path) -> BlockStream:
    """The stream of a file in Mooncake's form, imported into `folder`/a.kvtrace."""
    out = folder / "a.kvtrace"
    assert kvtrace.cli.main(["import", "mooncake", str(source), "--out", str(out)]) == 0
    return read_stream(kvtrace.open(out))
