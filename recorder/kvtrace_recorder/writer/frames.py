"""Frames on the socket between the model's process and the writer's: length, parts, descriptors."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

_HEADER = struct.Struct("<IIII")
#: The kernel takes 253 descriptors with one message.
DESCRIPTORS = 64


@dataclass(frozen=True)
class Frame:
    """What was sent at once.

    Attributes
    ----------
    kind : bytes
        JSON that says what the frame is.
    text, loose : bytes
        A message as `codec.encode` gives it; empty in frames of another kind.
    handles : list of int
        File descriptors, the receiver's from now on.
    """

    kind: bytes
    text: bytes
    loose: bytes
    handles: list[int]


def send(
    channel: socket.socket,
    kind: bytes,
    text: bytes = b"",
    loose: bytes = b"",
    handles: Sequence[int] = (),
) -> None:
    """Send a frame."""
    header = _HEADER.pack(len(kind), len(text), len(loose), len(handles))
    if handles:
        socket.send_fds(channel, [header], list(handles))
    else:
        channel.sendall(header)
    channel.sendall(kind + text + loose)


def receive(channel: socket.socket) -> Frame | None:
    """Receive a frame; None where the other side is gone, also in the middle of one."""
    header, handles = b"", []
    while len(header) < _HEADER.size:
        part, found, _, _ = socket.recv_fds(channel, _HEADER.size - len(header), DESCRIPTORS)
        handles += found
        if not part:
            return None
        header += part
    *sizes, count = _HEADER.unpack(header)
    kind, text, loose = (_exactly(channel, size) for size in sizes)
    if kind is None or text is None or loose is None or len(handles) != count:
        for handle in handles:
            os.close(handle)
        return None
    return Frame(kind, text, loose, list(handles))


def _exactly(channel: socket.socket, size: int) -> bytes | None:
    found = bytearray()
    while len(found) < size:
        part = channel.recv(min(size - len(found), 1 << 20))
        if not part:
            return None
        found += part
    return bytes(found)
