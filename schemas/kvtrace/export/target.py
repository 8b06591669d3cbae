"""Where an export goes: nothing is overwritten unasked, and what is there is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvtrace.errors import InputError


@contextmanager
def new_target(path: Path, *, force: bool) -> Iterator[Path]:
    """A place beside `path` to write a file or a folder to; renamed to `path` at the end.

    Parameters
    ----------
    path : pathlib.Path
        What is to be made.
    force : bool
        Replace what is there.

    Raises
    ------
    InputError
        Where `path` exists and `force` is not given, or the disk does not take it.
    """
    if path.exists() and not force:
        raise InputError(
            f"{path} exists; a new path was expected; choose another one, or --force to replace it"
        )
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        _remove(path)
        aside.rename(path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror or error}); choose another place"
        ) from error
    finally:
        _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()
