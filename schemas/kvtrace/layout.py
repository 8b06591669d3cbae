"""Names of the files and folders of a trace, and the version of the format."""

from __future__ import annotations

FORMAT_NAME = "kvtrace"
#: Major versions do not read each other; a newer minor only adds.
FORMAT_VERSION = "1.1"
#: Features a reader must know to read a trace at all. None yet: 1.0 is the base, 1.1 added
#: checksums of everything.
KNOWN_FEATURES: frozenset[str] = frozenset()

SUFFIX = ".kvtrace"
MANIFEST = "manifest.json"
DATABASE = "trace.duckdb"
REPLAYS = "replays"
#: What would have been on other memory: results that are of blocks, tiers and pools, not of tokens
#: kept and evicted.
WHATIFS = "whatifs"
CACHE = "cache"
#: Where `kvtrace check --repair` moves what is damaged.
QUARANTINE = "quarantine"
JOURNAL = "journal"
TABLES = "tables"
ARRAYS = "arrays.zarr"
#: What zarr says of an array or a group.
METADATA = "zarr.json"

#: Detail levels and the row arrays that each keeps.
DETAIL_ARRAYS: dict[str, tuple[str, ...]] = {
    "events": (),
    "summary": ("key_norm", "value_norm", "received"),
    "qk": ("q", "k", "lse"),
    "qkv": ("q", "k", "v", "lse"),
}


#: Kinds of row arrays that are there only for rows with a kept query.
QUERY_ARRAYS = frozenset({"q", "lse", "q_prerope"})


def rank_directory(rank: int) -> str:
    """Name of the folder that one recording process owns."""
    return f"rank-{rank:05d}"


def rank_number(directory: str) -> int:
    """The rank whose folder has this name."""
    return int(directory.removeprefix("rank-"))


def array_name(kind: str, group: int) -> str:
    """Name of the array of `kind` for a group of equally shaped layers."""
    return kind if group == 0 else f"{kind}_{group}"
