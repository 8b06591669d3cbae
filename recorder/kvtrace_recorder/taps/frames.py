"""Who calls a function that is not told: the modules on the stack of Python frames.

Hooks on modules would tell too, but they put every module on torch's slow call path and switch
the fast path of `nn.MultiheadAttention` off, which changes outputs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import nn

#: Frames between an attention module's own and the function it calls, at most.
DEPTH = 12


def callers(depth: int) -> Iterator[FrameType]:
    """The frames that led here, from `depth` above the caller outwards."""
    frame: FrameType | None = sys._getframe(depth + 2)
    for _ in range(DEPTH):
        if frame is None:
            return
        yield frame
        frame = frame.f_back


def module_of(frame: FrameType) -> nn.Module | None:
    """The module whose method a frame runs; None for functions, and for torch's `nn.Softmax`."""
    code = frame.f_code
    if not code.co_argcount:
        return None
    found: Any = frame.f_locals.get(code.co_varnames[0])
    return found if isinstance(found, nn.Module) and not isinstance(found, nn.Softmax) else None


def calling_module(depth: int = 0) -> nn.Module | None:
    """The innermost module on the stack."""
    found = (module_of(frame) for frame in callers(depth + 1))
    return next((module for module in found if module is not None), None)
