"""Block policies of one's own, from a Python file: `file.py:Class`."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from types import ModuleType

from kvtrace.errors import InputError
from kvtrace_viewer.blocks.policy import BlockPolicy
from kvtrace_viewer.replay.plugins import run_file

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
        _loaded[key] = _checked(run_file(path), path, kind)
    return _loaded[key]


@contextmanager
def mistakes_explained() -> Iterator[None]:
    """Turn what a user's policy raises into one line that says where and why.

    Raises
    ------
    InputError
        In the place of the policy's own error.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        files = {inspect.getsourcefile(kind) for kind in _loaded.values()}
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in files]
        if not frames:
            raise
        at = frames[-1]
        raise InputError(
            f"{at.filename} line {at.lineno}, in {at.name}: {type(error).__name__}: {error}; "
            "the policy was expected to run; mend that line"
        ) from error


def _checked(module: ModuleType, path: Path, kind: str | None) -> type[BlockPolicy]:
    own = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, BlockPolicy)
        and value.__module__ == module.__name__
    }
    names = ", ".join(own) or "none"
    if kind is None and len(own) == 1:
        (kind,) = own
    if kind not in own:
        raise InputError(
            f"{path} has the block policies {names}; {kind or 'one, and no more,'} was expected;"
            f" name one: --policy {path.name}:{next(iter(own), 'Mine')}, derived from"
            " kvtrace_viewer.blocks.BlockPolicy or StepPolicy"
        )
    found = own[kind]
    bare = [f.name for f in fields(found) if f.default is MISSING]
    if bare or ("__dataclass_params__" not in vars(found) and inspect.get_annotations(found)):
        raise InputError(
            f"{path}: {kind} has parameters and {', '.join(bare) or 'is no dataclass'} without"
            " default; a dataclass with defaults was expected; write @dataclass(frozen=True,"
            " kw_only=True) above it and name = parameter(default, help, unit) in it"
        )
    if not found.name:
        found.name = f"{path.name}:{kind}"
    return found
