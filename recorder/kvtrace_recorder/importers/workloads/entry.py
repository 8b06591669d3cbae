"""One request of a workload, as every format gives it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Longest sequence that is believed, in tokens: a line that says more is damaged.
MOST_TOKENS = 1 << 30


@dataclass(frozen=True, slots=True)
class Entry:
    """A request and the blocks of its tokens.

    Attributes
    ----------
    arrival_ns : int
        On the source's clock.
    input_tokens, output_tokens : int or None
        Of the prompt, and generated; None where the source does not say.
    block_size : int
        Tokens of a full block.
    hashes : sequence of int or str
        The source's ids of the blocks, in the order of the tokens.
    external_id : str or None
        The source's id of the request.
    namespace : str or None
        Where the hashes are valid; None: everywhere.
    """

    arrival_ns: int
    input_tokens: int
    output_tokens: int | None
    block_size: int
    hashes: Sequence[int | str]
    external_id: str | None = None
    namespace: str | None = None

    def block_tokens(self) -> NDArray[np.int32]:
        """Tokens in each block, int32 [block].

        Blocks beyond those of the prompt hold generated tokens.

        Raises
        ------
        ValueError
            Where there are more blocks than tokens, or a whole block of tokens has no block.
        """
        count, size, output = len(self.hashes), self.block_size, self.output_tokens or 0
        # The last block of the prompt may go on into what was generated, or there are more.
        tokens = self.input_tokens + (output if count * size >= self.input_tokens + size else 0)
        if not tokens - size < count * size < tokens + size:
            raise ValueError("blocks do not fit tokens")
        return np.minimum(size, tokens - size * np.arange(count)).astype(np.int32)


def whole(record: dict[str, Any], name: str, *, least: int = 0) -> int:
    """A field that is a whole number of tokens.

    Raises
    ------
    ValueError
        Where it is missing or something else.
    """
    found = record.get(name)
    if isinstance(found, bool) or not isinstance(found, int) or not least <= found <= MOST_TOKENS:
        raise ValueError(f"no {name} of at least {least}")
    return found


def time_ns(record: dict[str, Any], name: str, unit_ns: int) -> int:
    """A field that is a time, as nanoseconds.

    Raises
    ------
    ValueError
        Where it is missing or no number.
    """
    found = record.get(name)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise ValueError(f"no time {name}")
    try:
        return round(found * unit_ns)
    except (OverflowError, ValueError) as error:
        raise ValueError(f"no time {name}") from error


def hash_list(record: dict[str, Any], name: str) -> list[int | str]:
    """A field that is a list of block hashes.

    Raises
    ------
    ValueError
        Where it is missing, or holds something else than numbers or texts.
    """
    found = record.get(name)
    if not isinstance(found, list) or not {type(x) for x in found} <= {int, str}:
        raise ValueError(f"no list {name} of hashes")
    return found
