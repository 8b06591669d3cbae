"""The model's side of the writer's process: starts it, feeds it, hears what it says."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kvtrace
import kvtrace_recorder
from kvtrace_recorder.messages import Message
from kvtrace_recorder.writer import frames
from kvtrace_recorder.writer.codec import encode
from kvtrace_recorder.writer.slabs import Slab

#: Threads of the numerical libraries in the writer: it has one core to itself at best.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_START = Path(__file__).with_name("start.py")


@dataclass(frozen=True)
class Answer:
    """What the writer says.

    Attributes
    ----------
    kind : {"opened", "written", "closed"}
        What happened.
    value : object
        Of written the message's number, of closed what failed or None.
    status : dict or None
        Fields of `kvtrace_recorder.writer.loop.Status`.
    """

    kind: str
    value: Any
    status: dict[str, Any] | None


class WriterProcess:
    """A process that writes one trace.

    Parameters
    ----------
    options : dict
        Arguments of `kvtrace.writer.TraceWriter`, plain values.

    Raises
    ------
    OSError
        Where no process can be started.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._channel, theirs = socket.socketpair()
        _channels.add(self._channel)
        try:
            self._process = _start(theirs)
        except BaseException:
            self._channel.close()
            raise
        finally:
            theirs.close()
        self._known: set[int] = set()
        self._forget: list[int] = []
        frames.send(self._channel, json.dumps(options).encode())

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def send(self, number: int, message: Message, slabs: Sequence[Slab]) -> None:
        """Send a message whose arrays stand in these slabs."""
        new = [slab for slab in slabs if slab.number not in self._known]
        for start in range(0, len(new), frames.DESCRIPTORS):
            some = new[start : start + frames.DESCRIPTORS]
            sizes = json.dumps({"slabs": [[slab.number, slab.size] for slab in some]})
            frames.send(self._channel, sizes.encode(), handles=[slab.handle for slab in some])
        self._known.update(slab.number for slab in new)
        # The hearing thread may add to them meanwhile.
        forget = self._forget[:]
        del self._forget[: len(forget)]
        kind = json.dumps({"message": number, "forget": forget})
        frames.send(self._channel, kind.encode(), *encode(message, slabs))

    def forget(self, slab: Slab) -> None:
        """A slab will not be used again."""
        self._known.discard(slab.number)
        self._forget.append(slab.number)

    def end(self, *, complete: bool) -> None:
        """No further message will come."""
        frames.send(self._channel, json.dumps({"end": complete}).encode())

    def answers(self) -> Iterator[Answer]:
        """What the writer says, until it is gone."""
        with self._channel.makefile("rb") as lines:
            for line in lines:
                found = json.loads(line)
                status = found.pop("status", None)
                ((kind, value),) = found.items()
                yield Answer(kind, value, status)

    def wait(self) -> int:
        """Wait for its end; its exit status."""
        try:
            return self._process.wait()
        finally:
            self._channel.close()


#: Ends of sockets that a forked child must not hold open: its parent's death would go unseen.
_channels: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_in_child() -> None:
    for channel in list(_channels):
        # Not close(): the file made of it would keep the descriptor open.
        if (handle := channel.detach()) >= 0:
            os.close(handle)


os.register_at_fork(after_in_child=_close_in_child)


def _start(channel: socket.socket) -> subprocess.Popen[bytes]:
    own = {str(Path(str(module.__file__)).parents[1]) for module in (kvtrace, kvtrace_recorder)}
    paths = json.dumps([sorted(own), [path for path in sys.path[1:] if path]])
    return subprocess.Popen(
        [sys.executable, "-I", str(_START), str(channel.fileno())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, **_ONE_THREAD, "KVTRACE_WRITER_PATHS": paths},
        pass_fds=[channel.fileno()],
        # Out of the host's process group: signals from a terminal are for the host.
        start_new_session=True,
    )
