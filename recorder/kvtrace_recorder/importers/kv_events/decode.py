"""KV-event messages as vLLM, SGLang and their like put them on the wire, turned into dataclasses.

A message is `[ts, [event, ...], data_parallel_rank]`, or the same as a map. An event is a map with
its name under `type` (vLLM since 0.24, SGLang today) or an array with its name first (both before).
The fields behind the first four came one by one over the versions, always at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: Fields of the array form in order of position.
_POSITIONS: dict[str, tuple[str, ...]] = {
    "BlockStored": (
        "block_hashes",
        "parent_block_hash",
        "token_ids",
        "block_size",
        "lora_id",
        "medium",
        "lora_name",
        "extra_keys",
        "group_idx",
        "kv_cache_spec_kind",
        "kv_cache_spec_sliding_window",
    ),
    "BlockRemoved": ("block_hashes", "medium", "group_idx"),
    "AllBlocksCleared": ("medium",),
}
#: Fields of BlockStored that the tables have columns for; all others go into `details`.
_COLUMNS = frozenset(
    {"block_hashes", "parent_block_hash", "token_ids", "block_size", "medium", "group_idx"}
)
_RANKS = ("data_parallel_rank", "attn_dp_rank", "dp_rank")
_SESSIONS = ("request_id", "session_id")


@dataclass(frozen=True)
class BlockStored:
    """Blocks came to lie on a medium, each the child of the one before it.

    Attributes
    ----------
    block_hashes : list of str
        Text of the source's hashes.
    parent_block_hash : str or None
        The block before the first one.
    token_ids : list of list of int, or None
        Per block; None where the source did not say or they do not divide over the blocks.
    block_size : int
        Tokens that a full block holds.
    medium : str or None
        Where, in lower case; None where the source does not say.
    group_idx : int or None
        Cache group.
    session : str or None
        The request or session that caused it.
    details : list of dict
        Per block: whatever else was set.
    """

    block_hashes: list[str]
    parent_block_hash: str | None
    token_ids: list[list[int]] | None
    block_size: int
    medium: str | None
    group_idx: int | None
    session: str | None
    details: list[dict[str, Any]]


@dataclass(frozen=True)
class BlockRemoved:
    """Blocks are no longer on a medium."""

    block_hashes: list[str]
    medium: str | None
    group_idx: int | None


@dataclass(frozen=True)
class AllBlocksCleared:
    """A cache was emptied; medium is None where the source does not say which."""

    medium: str | None


Event = BlockStored | BlockRemoved | AllBlocksCleared


@dataclass
class Batch:
    """One message.

    Attributes
    ----------
    ts_ns : int or None
        Wall clock of the source; None where a dump does not say.
    rank : int or None
        Data-parallel rank.
    events : list of Event
        Those that could be read.
    problems : list of (str, str)
        What could not be read, and why.
    """

    ts_ns: int | None
    rank: int | None
    events: list[Event] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)


def decode_batch(message: Any) -> Batch:
    """Decode one unpacked message.

    Raises
    ------
    ValueError
        Where it is no message of KV events at all; a single bad event is a problem of the batch.
    """
    ts, events, rank = _envelope(message)
    batch = Batch(_nanoseconds(ts), _optional_int(rank, "data_parallel_rank"))
    for event in events:
        try:
            _decode_event(event, batch)
        except ValueError as error:
            batch.problems.append(("kv events", str(error)))
    return batch


def _envelope(message: Any) -> tuple[Any, Sequence[Any], Any]:
    if isinstance(message, Mapping):
        rank = next((message[name] for name in _RANKS if name in message), None)
        ts, events = message.get("ts", message.get("timestamp")), message.get("events")
    elif isinstance(message, list | tuple) and len(message) >= 2:
        ts, events = message[:2]
        rank = message[2] if len(message) > 2 else None
    else:
        raise ValueError("no [ts, events, rank] and no map with events")
    if not isinstance(events, list | tuple):
        raise ValueError("no list of events in the message")
    return ts, events, rank


def _nanoseconds(ts: Any) -> int | None:
    if ts is None:
        return None
    if isinstance(ts, bool) or not isinstance(ts, int | float) or not 0 <= ts < 2**63:
        raise ValueError("the message's time is no number of seconds")
    # Seconds on vLLM's and SGLang's wire; others count milli-, micro- or nanoseconds since 1970.
    for limit, unit in ((1e11, 10**9), (1e14, 10**6), (1e17, 10**3)):
        if ts < limit:
            return round(ts * unit)
    return int(ts)


def _decode_event(event: Any, batch: Batch) -> None:
    name, fields = _named(event)
    if name not in _POSITIONS:
        raise ValueError(f"unknown event type {name}")
    medium = fields.get("medium")
    if medium is not None and not isinstance(medium, str):
        raise ValueError(f"{name} with a medium that is no text")
    device = medium.lower() if medium else None
    if name == "AllBlocksCleared":
        batch.events.append(AllBlocksCleared(device))
        return
    hashes = fields.get("block_hashes")
    if not isinstance(hashes, list | tuple):
        raise ValueError(f"{name} without a list of block_hashes")
    texts = [_hash_text(value) for value in hashes]
    group = _optional_int(fields.get("group_idx"), "group_idx")
    if name == "BlockRemoved":
        batch.events.append(BlockRemoved(texts, device, group))
    else:
        batch.events.append(_stored(fields, texts, device, group, batch))


def _named(event: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(event, Mapping):
        fields = {str(key): value for key, value in event.items() if key != "type"}
        return _name(event.get("type")), fields
    if not isinstance(event, list | tuple) or not event:
        raise ValueError("an event that is neither a map nor an array")
    name, values = _name(event[0]), list(event[1:])
    names = _POSITIONS.get(name, ())
    fields = dict(zip(names, values, strict=False))
    if len(values) > len(names):
        fields["further_fields"] = values[len(names) :]
    # SGLang puts a map of further fields where vLLM has the LoRA's name.
    if isinstance(fields.get("lora_name"), Mapping):
        fields |= {str(key): value for key, value in fields.pop("lora_name").items()}
    return name, fields


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("an event without a name")
    # The name goes into the trace: one of a hostile or broken source must not fill it.
    return value[:80]


def _stored(
    fields: dict[str, Any], hashes: list[str], device: str | None, group: int | None, batch: Batch
) -> BlockStored:
    size = _optional_int(fields.get("block_size"), "block_size")
    if not size or size < 0:
        raise ValueError("BlockStored without a block_size")
    parent = fields.get("parent_block_hash")
    tokens = fields.get("token_ids")
    per_block = _per_block(tokens, len(hashes), size)
    if tokens and per_block is None:
        batch.problems.append(("token ids", "token_ids that do not divide over their blocks"))
    session = next((str(fields[name]) for name in _SESSIONS if fields.get(name) is not None), None)
    return BlockStored(
        hashes,
        None if parent is None else _hash_text(parent),
        per_block,
        size,
        device,
        group,
        session,
        _details(fields, len(hashes)),
    )


def _per_block(tokens: Any, blocks: int, size: int) -> list[list[int]] | None:
    """Share an event's token ids out; None where nothing says which block holds which."""
    if not isinstance(tokens, list | tuple) or not tokens or not blocks:
        return None
    if any(type(token) is not int or not 0 <= token < 2**31 for token in tokens):
        return None
    # Only the last block of an event may be partly full.
    if blocks > 1 and not (blocks - 1) * size < len(tokens) <= blocks * size:
        return None
    if blocks == 1:
        return [list(tokens)]
    return [list(tokens[at : at + size]) for at in range(0, blocks * size, size)]


def _details(fields: dict[str, Any], blocks: int) -> list[dict[str, Any]]:
    rest = {
        name: value
        for name, value in fields.items()
        if name not in _COLUMNS and name not in _SESSIONS and value is not None
    }
    keys = rest.pop("extra_keys", None)
    found = [dict(rest) for _ in range(blocks)]
    if isinstance(keys, list | tuple) and len(keys) == blocks:
        for one, own in zip(found, keys, strict=True):
            if own is not None:
                one["extra_keys"] = own
    elif keys is not None:
        for one in found:
            one["extra_keys"] = keys
    return found


def _hash_text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, str) or type(value) is int:
        return str(value)
    raise ValueError("a block hash that is neither bytes nor a number nor text")


def _optional_int(value: Any, name: str) -> int | None:
    if value is None:
        return None
    if type(value) is not int or not -(2**31) <= value < 2**31:
        raise ValueError(f"{name} is no whole number")
    return value
