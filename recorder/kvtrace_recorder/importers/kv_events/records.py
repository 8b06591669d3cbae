"""One record of a dump or a stream: topic, sequence number, message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvtrace_recorder.importers.kv_events.decode import Batch, decode_batch

_PAYLOADS = ("payload", "batch", "message")


@dataclass(frozen=True)
class Record:
    """A message with what its frames said beside it."""

    topic: str
    sequence: int | None
    batch: Batch


def read_record(found: Any) -> Record:
    """Read a record in any of the forms that people keep.

    `[topic, sequence, message]` with the message packed or not; a message as it is; a map with the
    message under `payload`; a map or an array of one single event.

    Raises
    ------
    ValueError
        Where it is none of these.
    """
    if isinstance(found, Mapping):
        return _from_map(found)
    if not isinstance(found, list | tuple) or not found:
        raise ValueError("neither a map nor an array")
    if len(found) == 3 and isinstance(found[0], str | bytes) and _is_sequence(found[1]):
        topic, sequence, payload = found
        return Record(_text(topic), _number(sequence), decode_batch(_unpacked(payload)))
    if isinstance(found[0], str):
        return Record("", None, decode_batch([None, [found]]))
    return Record("", None, decode_batch(found))


def unpack(payload: bytes) -> Any:
    """Unpack one msgpack object.

    Raises
    ------
    ValueError
        Where the bytes are no whole msgpack object.
    """
    import msgpack

    try:
        return msgpack.unpackb(payload, strict_map_key=False, unicode_errors="replace")
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise ValueError("a payload that is no msgpack") from error


def _from_map(found: Mapping[Any, Any]) -> Record:
    topic = found.get("topic")
    sequence = found.get("seq", found.get("sequence"))
    for name in _PAYLOADS:
        if name in found:
            batch = decode_batch(_unpacked(found[name]))
            return Record(_text(topic), _number(sequence), batch)
    if "events" in found:
        return Record(_text(topic), _number(sequence), decode_batch(found))
    if "type" not in found:
        raise ValueError("a map without events and without a type")
    outer = ("ts", "timestamp", "topic", "seq", "sequence", "data_parallel_rank", "dp_rank")
    event = {key: value for key, value in found.items() if key not in outer}
    # Lines of one message share its number, so a number says nothing about what is missing.
    ts = found.get("ts", found.get("timestamp"))
    rank = found.get("data_parallel_rank", found.get("dp_rank"))
    return Record(_text(topic), None, decode_batch([ts, [event], rank]))


def _unpacked(payload: Any) -> Any:
    return unpack(payload) if isinstance(payload, bytes) else payload


def _is_sequence(value: Any) -> bool:
    return type(value) is int or (isinstance(value, bytes) and len(value) == 8)


def _number(value: Any) -> int | None:
    if isinstance(value, bytes):
        return int.from_bytes(value, "big", signed=True)
    if value is None or (type(value) is int and value >= 0):
        return value
    raise ValueError("a sequence number that is no whole number")


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return "" if value is None else str(value)
