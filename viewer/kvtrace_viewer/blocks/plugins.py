"""Block policies of one's own, from a Python file: `file.py:Class`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from kvtrace_viewer.blocks.policy import BlockPolicy
from kvtrace_viewer.user_files import class_of_file, mistakes_of

_loaded: dict[str, type[BlockPolicy]] = {}
"""Policies of files, by `file.py:Class` with the whole path."""


def load_block_policy(file: str, kind: str | None) -> type[BlockPolicy]:
    """Load a block policy from a Python file, which is run; its only one where `kind` is None.

    Raises
    ------
    InputError
        With the line and the reason, where the file cannot be run or the class is no block
        policy.
    """
    path = Path(file).resolve()
    key = f"{path}:{kind}"
    if key not in _loaded:
        found = class_of_file(path, kind, BlockPolicy)
        if not found.name:
            found.name = f"{path.name}:{found.__name__}"
        _loaded[key] = found
    return _loaded[key]


def mistakes_explained() -> AbstractContextManager[None]:
    """Turn what a user's policy raises into one line that says where and why."""
    return mistakes_of(_loaded.values())
