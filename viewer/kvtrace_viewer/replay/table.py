"""Tables of numbers per layer and KV head, as policies with a learned part take them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvtrace.errors import InputError


@cache
def read_table(policy: str, file: str) -> NDArray[np.float64]:
    """Read a JSON file of numbers `[layer][kv head]`, 0 or more.

    Raises
    ------
    InputError
        Where it cannot be read or holds something else.
    """
    shape = "JSON numbers of 0 or more as [[kv head, ...] of each layer] were expected"
    try:
        found = np.array(json.loads(Path(file).read_text(encoding="utf-8")), dtype=np.float64)
    except OSError as error:
        raise InputError(
            f"table of {policy} is {file}, which cannot be read ({error.strerror}); {shape}; "
            f"write {policy}:table=heads.json"
        ) from error
    except (ValueError, TypeError) as error:
        raise InputError(f"table of {policy}, {file}: {error}; {shape}; mend the file") from error
    if found.ndim != 2 or not found.size or not (np.isfinite(found) & (found >= 0)).all():
        raise InputError(
            f"table of {policy}, {file}, has shape {list(found.shape)} or a number below 0; "
            f"{shape}; mend the file"
        )
    return found


def entry(policy: str, file: str, layer: int, kv_head: int) -> tuple[NDArray[np.float64], float]:
    """Return the table and the number of one head.

    Raises
    ------
    InputError
        Where the table has no such head.
    """
    table = read_table(policy, file)
    if layer >= table.shape[0] or kv_head >= table.shape[1]:
        raise InputError(
            f"table of {policy}, {file}, has {table.shape[0]} layers of {table.shape[1]} KV heads; "
            f"layer {layer}, KV head {kv_head} was asked for; give one for this model"
        )
    return table, float(table[layer, kv_head])
