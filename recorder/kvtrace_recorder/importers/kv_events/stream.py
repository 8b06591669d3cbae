"""The sockets: SUB to the publisher, DEALER to its replay socket."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import zmq

from kvtrace.errors import InputError

#: Messages that may wait for us; ZeroMQ's own default of 1,000 drops silently during a long commit.
HIGH_WATER_MARK = 1_000_000
#: Messages taken from a socket before the other things of the loop get their turn.
_AT_ONCE = 1000
_END = -1


@dataclass(frozen=True)
class Frames:
    """A message as it came.

    Attributes
    ----------
    topic : bytes or None
        None in the answer of a replay socket that does not tell it.
    sequence : int
        Its number.
    payload : bytes
        The packed events.
    replayed : bool
        Whether it came from the replay socket.
    """

    topic: bytes | None
    sequence: int
    payload: bytes
    replayed: bool


@dataclass(frozen=True)
class ReplayEnd:
    """The replay socket has sent all that it had."""


@dataclass(frozen=True)
class Malformed:
    """A message whose frames are not those of KV events."""

    frames: int


Received = Frames | ReplayEnd | Malformed


class Subscriber:
    """Connects to a publisher, or waits for publishers where the host is `*`.

    Parameters
    ----------
    endpoint : str
        tcp://HOST:PORT of the publisher, or tcp://*:PORT for publishers that connect to us.
    replay : str or None
        tcp://HOST:PORT of its replay socket.
    topic : str
        Only topics that begin so.

    Raises
    ------
    InputError
        For an address that ZeroMQ refuses.
    """

    def __init__(self, endpoint: str, replay: str | None, topic: str) -> None:
        self.endpoint = endpoint
        self.connected = False
        self._context = zmq.Context()
        try:
            self._sub = self._context.socket(zmq.SUB)
            self._sub.set(zmq.RCVHWM, HIGH_WATER_MARK)
            # A peer that vanished without a goodbye is noticed, and connected to again.
            self._sub.set(zmq.TCP_KEEPALIVE, 1)
            self._sub.set(zmq.TCP_KEEPALIVE_IDLE, 30)
            self._sub.subscribe(topic)
            # Nothing else is reported there, so any report means that somebody is.
            accepted = zmq.EVENT_CONNECTED | zmq.EVENT_ACCEPTED
            self._monitor = self._sub.get_monitor_socket(accepted)
            _attach(self._sub, endpoint)
            self._dealer: Any = None
            if replay is not None:
                self._dealer = self._context.socket(zmq.DEALER)
                self._dealer.set(zmq.RCVHWM, HIGH_WATER_MARK)
                _attach(self._dealer, replay)
        except BaseException:
            self._context.destroy(linger=0)
            raise

    def close(self) -> None:
        """Let go of the sockets."""
        self._sub.disable_monitor()
        self._context.destroy(linger=0)

    @property
    def can_replay(self) -> bool:
        """Whether there is a replay socket to ask."""
        return self._dealer is not None

    def ask_again(self, first: int) -> None:
        """Ask the replay socket for every message from `first` on that it still has."""
        self._dealer.send_multipart([b"", first.to_bytes(8, "big")])

    def receive(self, timeout_ms: int) -> Iterator[Received]:
        """What has come, waiting for at most `timeout_ms`; replayed messages first."""
        poller = zmq.Poller()
        for socket in (self._monitor, self._dealer, self._sub):
            if socket is not None:
                poller.register(socket, zmq.POLLIN)
        ready = dict(poller.poll(timeout_ms))
        if self._monitor in ready:
            self._monitor.recv_multipart()
            self.connected = True
        if self._dealer is not None and self._dealer in ready:
            yield from map(_answer, _waiting(self._dealer))
        if self._sub in ready:
            yield from map(_published, _waiting(self._sub))


def _attach(socket: Any, endpoint: str) -> None:
    # ZeroMQ takes a port that cannot exist and tries it for ever.
    port = re.fullmatch(r"tcp://.+:(\d+)", endpoint)
    if endpoint.startswith("tcp://") and not (port and 0 < int(port[1]) < 1 << 16):
        raise _bad_address(endpoint, "no port from 1 to 65535")
    try:
        if "*" in endpoint:
            socket.bind(endpoint)
        else:
            socket.connect(endpoint)
    except zmq.ZMQError as error:
        raise _bad_address(endpoint, str(error.strerror)) from error


def _bad_address(endpoint: str, why: str) -> InputError:
    return InputError(
        f"{endpoint} cannot be used ({why}); tcp://HOST:PORT was expected; check the address"
    )


def _waiting(socket: Any) -> Iterator[list[bytes]]:
    for _ in range(_AT_ONCE):
        try:
            yield socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return


def _published(frames: list[bytes]) -> Received:
    if len(frames) != 3 or len(frames[1]) != 8:
        return Malformed(len(frames))
    topic, sequence, payload = frames
    return _numbered(topic, sequence, payload, replayed=False)


def _answer(frames: list[bytes]) -> Received:
    # [b"", topic, sequence, payload], of older versions [b"", sequence, payload].
    if len(frames) not in (3, 4) or len(frames[-2]) != 8:
        return Malformed(len(frames))
    if int.from_bytes(frames[-2], "big", signed=True) == _END:
        return ReplayEnd()
    topic = frames[1] if len(frames) == 4 else None
    return _numbered(topic, frames[-2], frames[-1], replayed=True)


def _numbered(topic: bytes | None, sequence: bytes, payload: bytes, *, replayed: bool) -> Received:
    number = int.from_bytes(sequence, "big", signed=True)
    return Frames(topic, number, payload, replayed) if number >= 0 else Malformed(3)
