"""The files of a source that is a file or a folder."""

from __future__ import annotations

from pathlib import Path

from kvtrace.errors import InputError


def source_files(path: Path, pattern: str) -> list[Path]:
    """The file itself, or the files of a folder that the pattern matches, by name.

    Raises
    ------
    InputError
        Where there is none.
    """
    files = sorted(path.glob(pattern)) if path.is_dir() else [path]
    if not files:
        raise InputError(
            f"{path} holds no {pattern}; a file, or a folder with such files was expected;"
            " check the path"
        )
    return files
