"""The writer's process: `start.py` runs `main` here, with one end of a socket.

It outlives its host: when the host dies, however it dies, the socket ends, and what was sent is
written and the trace sealed as cut off.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import socket
from dataclasses import asdict
from typing import Any

from kvtrace_recorder.messages import Message
from kvtrace_recorder.writer import frames
from kvtrace_recorder.writer.codec import decode
from kvtrace_recorder.writer.loop import Status, describe, write_trace


def main(handle: int) -> None:
    """Write one trace."""
    # Ctrl-C and a terminal that closes are the host's business: it may need a while to end.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    channel = socket.socket(fileno=handle)
    first = frames.receive(channel)
    if first is not None:
        write_trace(SocketSource(channel), json.loads(first.kind))


class SocketSource:
    """Messages from the host; see `kvtrace_recorder.writer.loop.Source`."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._slabs: dict[int, mmap.mmap] = {}
        self._gone = False
        self.ended = False
        self.complete = False

    def opened(self) -> None:
        """Tell the host that the trace has been made."""
        self._tell({"opened": True})

    def next(self, timeout: float) -> tuple[int, Message] | None:
        """Read frames until one is a message."""
        while not self.ended and select.select([self._channel], [], [], timeout)[0]:
            frame = self._receive()
            if frame is None:
                self.ended = True
                break
            kind: dict[str, Any] = json.loads(frame.kind)
            if "end" in kind:
                self.ended, self.complete = True, kind["end"]
            elif "slabs" in kind:
                self._map(kind["slabs"], frame.handles)
            else:
                for number in kind["forget"]:
                    self._slabs.pop(number, None)
                message = decode(frame.text, frame.loose, lambda n: memoryview(self._slabs[n]))
                return kind["message"], message
        return None

    def written(self, number: int, status: Status) -> None:
        """Let the host use the message's slabs again."""
        self._tell({"written": number, "status": asdict(status)})

    def closed(self, status: Status, failure: BaseException | None) -> None:
        """Say the last word."""
        reason = None if failure is None else describe(failure)
        self._tell({"closed": reason, "status": asdict(status)})

    def _receive(self) -> frames.Frame | None:
        try:
            return frames.receive(self._channel)
        except OSError:
            return None

    def _map(self, sizes: list[list[int]], handles: list[int]) -> None:
        for (number, size), handle in zip(sizes, handles, strict=True):
            self._slabs[number] = mmap.mmap(handle, size, access=mmap.ACCESS_READ)
            os.close(handle)

    def _tell(self, what: dict[str, Any]) -> None:
        if self._gone:
            return
        try:
            self._channel.sendall(json.dumps(what).encode() + b"\n")
        except OSError:
            # The host is gone; what it sent is still written.
            self._gone = True
