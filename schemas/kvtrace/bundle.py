"""A trace as one zip: every file's SHA-256 inside, the same trace always the same bytes.

What is derived (`trace.duckdb`, `cache/`) stays out: whoever opens the extracted trace rebuilds it.
So does what `kvtrace check --repair` put aside.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from kvtrace.errors import TraceError
from kvtrace.export.target import new_target
from kvtrace.layout import CACHE, DATABASE, QUARANTINE
from kvtrace.manifest import is_trace
from kvtrace.trace import Trace

FORMAT = "kvtrace-bundle"
VERSION = 1
#: The zip's list of its own files.
CONTENTS = "bundle.json"
#: The list of a trace of a million files is some 150 MB.
_CONTENTS_BYTES = 1 << 30
_BLOCK = 1 << 20
#: Dates and modes of all files, so that the same trace makes the same bytes.
_EPOCH = (1980, 1, 1, 0, 0, 0)
_MODE = 0o100644 << 16

Progress = Callable[[float], None]


def write_bundle(
    trace: Trace,
    out: Path,
    *,
    force: bool = False,
    progress: Progress = lambda share: None,
) -> int:
    """Write the zip; returns how many files of the trace it holds.

    Raises
    ------
    TraceError
        Where the trace is being recorded, or a file is a link.
    InputError
        Where `out` exists and `force` is not given.
    """
    if trace.status == "recording":
        raise TraceError(
            f"{trace.path} is being recorded; one that has ended was expected; stop the recording"
        )
    names = sorted(_files(trace.path))
    sizes = {name: (trace.path / name).stat().st_size for name in names}
    whole, done = sum(sizes.values()) or 1, 0
    found: dict[str, dict[str, Any]] = {}
    with new_target(out, force=force) as place, zipfile.ZipFile(place, "w") as packed:
        for name in names:
            with (
                (trace.path / name).open("rb") as source,
                packed.open(_entry(f"{trace.path.name}/{name}"), "w", force_zip64=True) as target,
            ):
                size, sha256 = _copy(source, target)
            found[name] = {"size": size, "sha256": sha256}
            done += size
            progress(min(1.0, done / whole))
        contents = {"format": FORMAT, "version": VERSION, "trace": trace.path.name, "files": found}
        text = json.dumps(contents, indent=1, sort_keys=True)
        packed.writestr(_entry(CONTENTS), text.encode())
    return len(names)


def extract_bundle(
    bundle: Path, out: Path, *, force: bool = False, progress: Progress = lambda share: None
) -> Path:
    """Unpack a bundle to the folder `out`; every file is compared with its SHA-256.

    Raises
    ------
    TraceError
        Where it is no bundle of ours, lacks a file, has one that it does not list, has one whose
        content or name is not what it says, or does not hold a trace.
    InputError
        Where `out` exists and `force` is not given.
    """
    try:
        with zipfile.ZipFile(bundle) as packed, new_target(out, force=force) as place:
            _unpack(bundle, packed, place, progress)
            if not is_trace(place):
                raise _bad(bundle, "there is no trace in it")
    except (zipfile.BadZipFile, NotImplementedError, FileNotFoundError, IsADirectoryError) as error:
        raise _bad(bundle, str(error)) from error
    return out


def _files(root: Path) -> Iterator[str]:
    """Names of a trace's own files, below its root."""
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        if here == root:
            folders[:] = [name for name in folders if name not in (CACHE, QUARANTINE)]
        # What begins with a dot is being written, or was when its writer died.
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = here / name
            if name.startswith(".") or (here == root and name == DATABASE):
                continue
            if path.is_symlink():
                raise TraceError(
                    f"{path} is a link; a bundle holds files alone; put the file in its place"
                )
            yield path.relative_to(root).as_posix()


def _entry(name: str) -> zipfile.ZipInfo:
    # Stored: arrays and segments are compressed as they are.
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.external_attr = _MODE
    entry.create_system = 3
    return entry


def _copy(source: IO[bytes], target: IO[bytes], limit: int | None = None) -> tuple[int, str]:
    """Bytes copied, at most one more than the limit, and their SHA-256."""
    digest, size = hashlib.sha256(), 0
    while block := source.read(_BLOCK):
        digest.update(block)
        target.write(block)
        size += len(block)
        if limit is not None and size > limit:
            break
    return size, digest.hexdigest()


def _unpack(bundle: Path, packed: zipfile.ZipFile, place: Path, progress: Progress) -> None:
    files, folder = _contents(bundle, packed)
    listed = {f"{folder}/{name}": name for name in files}
    for entry in packed.infolist():
        if entry.filename != CONTENTS and entry.filename not in listed:
            raise _bad(bundle, f"{entry.filename!r} is not in its list")
    whole = sum(one["size"] for one in files.values()) or 1
    done = 0
    for full, name in listed.items():
        target = place / _safe(bundle, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with packed.open(full) as source, target.open("xb") as file:
                found = _copy(source, file, limit=files[name]["size"])
        except KeyError as error:
            raise _bad(bundle, f"{name} is missing") from error
        if found != (files[name]["size"], files[name]["sha256"]):
            raise _bad(bundle, f"{name} is not what was packed")
        done += found[0]
        progress(done / whole)


def _contents(bundle: Path, packed: zipfile.ZipFile) -> tuple[dict[str, dict[str, Any]], str]:
    """The listed files, and the folder that they are in."""
    try:
        if packed.getinfo(CONTENTS).file_size > _CONTENTS_BYTES:
            raise _bad(bundle, f"its {CONTENTS} is too long")
        found = json.loads(packed.read(CONTENTS))
        if found["format"] != FORMAT:
            raise KeyError("format")
        files = {
            str(name): {"size": int(one["size"]), "sha256": str(one["sha256"])}
            for name, one in found["files"].items()
        }
        folder, version = str(found["trace"]), int(found["version"])
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise _bad(bundle, f"it has no {CONTENTS} of ours") from error
    if version > VERSION:
        raise _bad(bundle, f"it has version {version}, this one reads {VERSION}; upgrade kvtrace")
    return files, folder


def _safe(bundle: Path, name: str) -> PurePosixPath:
    """A name that stays inside the folder it is joined to."""
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or {"\\", ":"} & set(name):
        raise _bad(bundle, f"{name!r} would leave the trace's folder")
    return path


def _bad(bundle: Path, why: str) -> TraceError:
    return TraceError(
        f"{bundle} cannot be used ({why}); a file made by `kvtrace bundle` was expected; make it"
        " again, or copy it again"
    )
