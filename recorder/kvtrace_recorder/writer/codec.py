"""Messages as bytes between the two processes of a recording.

JSON for what is plain, with the type's name in each object; arrays in a slab are named by where
they stand, other arrays follow the JSON as they are. No pickle: nothing that is read can run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace_recorder.messages import MESSAGES
from kvtrace_recorder.writer.slabs import Slab

_TYPE = "!"
_TYPES = {kind.__name__: kind for kind in MESSAGES}
Array = NDArray[Any]


def encode(message: Any, slabs: Sequence[Slab] = ()) -> tuple[bytes, bytes]:
    """Turn a message into its JSON and the bytes of the arrays that stand in no slab."""
    loose: list[bytes] = []
    length = 0

    def default(value: Any) -> Any:
        nonlocal length
        if isinstance(value, np.ndarray):
            found = _place(value, slabs)
            if found is None:
                raw = value.tobytes()
                found = {"at": length}
                loose.append(raw)
                length += len(raw)
            return {_TYPE: "array", "dtype": value.dtype.str, "shape": value.shape, **found}
        if isinstance(value, np.generic):
            return value.item()
        name = type(value).__name__
        if _TYPES.get(name) is not type(value):
            raise TypeError(f"a {name} is no part of a message")
        return {_TYPE: name, **vars(value)}

    text = json.dumps(message, default=default, separators=(",", ":"))
    return text.encode(), b"".join(loose)


def decode(text: bytes, loose: bytes, slab: Callable[[int], memoryview]) -> Any:
    """Turn them back.

    Parameters
    ----------
    text, loose : bytes
        As `encode` gave them.
    slab : callable
        The memory of a slab, by its number.
    """

    def build(found: dict[str, Any]) -> Any:
        name = found.pop(_TYPE, None)
        if name is None:
            return found
        if name != "array":
            return _TYPES[name](**found)
        dtype, shape = np.dtype(found["dtype"]), found["shape"]
        source: Any = loose if "slab" not in found else slab(found["slab"])
        count = int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(source, dtype, count, found["at"]).reshape(shape)

    return json.loads(text, object_hook=build)


def _place(array: Array, slabs: Sequence[Slab]) -> dict[str, int] | None:
    if not slabs or not array.flags.c_contiguous:
        return None
    address = array.__array_interface__["data"][0]
    for slab in slabs:
        if slab.address <= address < slab.address + slab.size:
            return {"slab": slab.number, "at": address - slab.address}
    return None
