"""Patches of a function under every name by which modules hold it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from kvtrace_recorder.taps.patch import Patch


def rebound(owner: ModuleType, name: str, make: Callable[[Any], Any]) -> list[Patch]:
    """Patches of `owner.name` and of what `from owner import name` has made elsewhere.

    Parameters
    ----------
    owner : module
        Where the function lives.
    name : str
        Its name; copies under another name are not found.
    make : callable
        Given the function, returns what stands there while the patches are applied.

    Returns
    -------
    list of Patch
        Not yet applied.
    """
    original = getattr(owner, name)
    replaced = make(original)
    # vars, not getattr: some modules import others when asked for a name.
    holders = [
        module
        for module in list(sys.modules.values())
        if isinstance(module, ModuleType) and vars(module).get(name) is original
    ]
    return [Patch(holder, name, lambda _: replaced) for holder in holders]
