"""manifest.json: what makes a folder a trace."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvtrace.checksums import FIELD, damaged, document_sum
from kvtrace.errors import TraceError
from kvtrace.layout import FORMAT_NAME, FORMAT_VERSION, KNOWN_FEATURES, MANIFEST


@dataclass(frozen=True)
class Manifest:
    """Written once, when the trace is made.

    Attributes
    ----------
    format_version : str
        "major.minor"; a reader refuses a newer major.
    required_features : list of str
        Features a reader must know.
    kvtrace_version : str
        What wrote it.
    created_ns : int
        Wall clock, nanoseconds.
    source : str
        recorded, imported or synthetic.
    command : list of str
        The command line that made it.
    launch : str or None
        What the processes that recorded it together have in common; None where it was one.
    """

    kvtrace_version: str
    created_ns: int
    source: str
    command: list[str]
    format_version: str = FORMAT_VERSION
    required_features: list[str] = field(default_factory=list)
    launch: str | None = None

    def write(self, trace: Path) -> None:
        """Write atomically."""
        temporary = trace / f".{MANIFEST}.{os.getpid()}"
        document = {"format": FORMAT_NAME, **asdict(self)}
        document[FIELD] = document_sum(document)
        temporary.write_text(json.dumps(document, indent=2) + "\n")
        temporary.replace(trace / MANIFEST)


def is_trace(path: Path) -> bool:
    """Whether the folder carries a manifest of ours."""
    try:
        found = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT_NAME


def read_manifest(path: Path) -> Manifest:
    """Read and check the manifest of a trace.

    Raises
    ------
    TraceError
        For a path that is no trace, and for a format this version cannot read.
    """
    if not path.exists():
        raise TraceError(
            f"{path} does not exist; a .kvtrace directory was expected;"
            " `kvtrace demo` or `kvtrace record` makes one"
        )
    try:
        found: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if found["format"] != FORMAT_NAME:
            raise KeyError("format")
        major, minor = (int(part) for part in str(found["format_version"]).split("."))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TraceError(
            f"{path} is not a kvtrace trace; a directory with a {MANIFEST} of ours was expected;"
            " give the path of a .kvtrace directory"
        ) from error
    _check_readable(path, found, major)
    # Format 1.0 had no checksums.
    if (minor or FIELD in found) and found.get(FIELD) != document_sum(found):
        raise damaged(path / MANIFEST, "its checksum differs")
    known = {name: found[name] for name in Manifest.__dataclass_fields__ if name in found}
    return Manifest(**known)


def _check_readable(path: Path, found: dict[str, Any], major: int) -> None:
    ours = int(FORMAT_VERSION.split(".")[0])
    remedy = f"install kvtrace {found.get('kvtrace_version')} or newer"
    if major != ours:
        raise TraceError(
            f"{path} has format {found['format_version']}; this version reads {ours}.x; {remedy}"
        )
    unknown = sorted(set(found.get("required_features", ())) - KNOWN_FEATURES)
    if unknown:
        raise TraceError(
            f"{path} needs the features {', '.join(unknown)}, which this version does not know;"
            f" a trace without them was expected; {remedy}"
        )
