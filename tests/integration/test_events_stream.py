"""Following a real ZeroMQ publisher that speaks as vLLM and SGLang do, frame for frame."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

import kvtrace
from kvtrace.errors import TraceError


class Publisher:
    """PUB with a replay ROUTER.

    Parameters
    ----------
    replay_topic : bool
        Whether replay answers carry the topic (vLLM now) or not (vLLM before, SGLang).
    """

    def __init__(self, ports: tuple[int, int] = (0, 0), *, replay_topic: bool = True) -> None:
        self._context = zmq.Context()
        self._pub = self._context.socket(zmq.PUB)
        self._router = self._context.socket(zmq.ROUTER)
        self.endpoint = _bind(self._pub, ports[0])
        self.replay = _bind(self._router, ports[1])
        self.ports = tuple(int(x.rsplit(":", 1)[1]) for x in (self.endpoint, self.replay))
        self._replay_topic = replay_topic
        self._buffer: dict[int, bytes] = {}
        self.requests: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def publish(
        self,
        sequence: int,
        *events: Any,
        send: bool = True,
        keep: bool = True,
        ts: float | None = None,
    ) -> None:
        """Send a message, keep it for replays, or neither: then it is lost."""
        payload = msgpack.packb([time.time() if ts is None else ts, list(events), 0])
        if keep:
            self._buffer[sequence] = payload
        if send:
            self._pub.send_multipart([b"kv-events", sequence.to_bytes(8, "big"), payload])

    def send(self, *frames: bytes) -> None:
        """Send any frames."""
        self._pub.send_multipart(frames)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._context.destroy(linger=1000)

    def _serve(self) -> None:
        while not self._stop.is_set():
            if not self._router.poll(20):
                continue
            client, empty, start = self._router.recv_multipart()
            assert empty == b""
            first = int.from_bytes(start, "big")
            self.requests.append(first)
            topic = [b"kv-events"] if self._replay_topic else []
            for sequence, payload in sorted(self._buffer.items()):
                if sequence >= first:
                    frames = [*topic, sequence.to_bytes(8, "big"), payload]
                    self._router.send_multipart([client, b"", *frames])
            end = (-1).to_bytes(8, "big", signed=True)
            self._router.send_multipart([client, b"", *topic, end, b""])


def _bind(socket: zmq.Socket[bytes], port: int) -> str:
    socket.bind(f"tcp://127.0.0.1:{port or '*'}")
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


@pytest.fixture
def publishers() -> Iterator[Callable[..., Publisher]]:
    """Make publishers; they are closed at the end."""
    made: list[Publisher] = []

    def make(*args: Any, **options: Any) -> Publisher:
        made.append(Publisher(*args, **options))
        return made[-1]

    yield make
    for publisher in made:
        publisher.close()


class Follower:
    """`kvtrace import kv-events` in a process of its own."""

    def __init__(self, out: Path, *words: str) -> None:
        self.out = out
        code = "import sys; from kvtrace.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, "import", "kv-events", *words, "--out", str(out)]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def rows(self, table: str = "kv_events") -> list[dict[str, Any]]:
        """What a reader sees now."""
        try:
            found: list[dict[str, Any]] = kvtrace.open(self.out).table(table).to_pylist()
        except TraceError:
            return []
        return found

    def wait_for(self, count: int, table: str = "kv_events") -> list[dict[str, Any]]:
        """Wait until the trace, still being written, has `count` rows."""
        deadline = time.monotonic() + 100
        while len(rows := self.rows(table)) < count:
            assert self._process.poll() is None, self.error()
            assert time.monotonic() < deadline, (count, rows)
            time.sleep(0.05)
        return rows

    def end(self, number: int = signal.SIGINT) -> kvtrace.Trace:
        """End it as a user would; the finished trace."""
        self._process.send_signal(number)
        return self.ended()

    def ended(self) -> kvtrace.Trace:
        """The trace of a process that ends by itself."""
        self.stderr = self.error()
        assert self._process.returncode == 0, self.stderr
        trace = kvtrace.open(self.out)
        assert trace.status == "complete"
        return trace

    def line(self) -> str:
        """The next line that it says."""
        assert self._process.stderr is not None
        return self._process.stderr.readline()

    def error(self) -> str:
        return self._process.communicate(timeout=100)[1]

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


@pytest.fixture
def follow(tmp_path: Path) -> Iterator[Callable[..., Follower]]:
    """Start followers; none is left behind."""
    started: list[Follower] = []

    def start(publisher: Publisher, *words: str) -> Follower:
        follower = Follower(tmp_path / f"{len(started)}.kvtrace", publisher.endpoint, *words)
        started.append(follower)
        _join(publisher, follower)
        return follower

    yield start
    for follower in started:
        follower.kill()


def _join(publisher: Publisher, follower: Follower) -> None:
    """Send a harmless message again and again until the subscriber is there: PUB has no memory."""
    began = time.time()
    while not follower.rows():
        assert time.time() < began + 100
        publisher.publish(0, {"type": "AllBlocksCleared"}, ts=began)
        time.sleep(0.05)


def stored(name: str, *hashes: int, parent: int | None = None, medium: str = "GPU") -> Any:
    """A BlockStored of blocks of 2 tokens: as a map (vLLM) or as an array (SGLang)."""
    tokens = [token for value in hashes for token in (10 * value, 10 * value + 1)]
    if name == "array":
        return ["BlockStored", list(hashes), parent, tokens, 2, None, medium]
    return {
        "type": "BlockStored",
        "block_hashes": list(hashes),
        "parent_block_hash": parent,
        "token_ids": tokens,
        "block_size": 2,
        "lora_id": None,
        "medium": medium,
        "lora_name": None,
        "session_id": "chat-1",
    }


def removed(name: str, *hashes: int, medium: str = "GPU") -> Any:
    if name == "array":
        return ["BlockRemoved", list(hashes), medium]
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": medium}


def told(trace: kvtrace.Trace) -> list[tuple[str, int | None, str | None]]:
    """Event, block, device in order, from the first stored block on."""
    rows = trace.table("kv_events").to_pylist()
    found = [(row["event"], row["block"], row["device"]) for row in rows]
    return found[next(i for i, row in enumerate(found) if row[0] == "store") :]


def losses(trace: kvtrace.Trace) -> list[tuple[int, str]]:
    rows = trace.table("gaps").to_pylist()
    return [(row["count"], row["reason"]) for row in rows if row["what"] == "kv event messages"]


@pytest.mark.parametrize("encoding", ["map", "array"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_happens_to_blocks(
    publishers: Callable[..., Publisher],
    follow: Callable[..., Follower],
    encoding: str,
    number: int,
) -> None:
    publisher = publishers()
    follower = follow(publisher)
    publisher.publish(1, stored(encoding, 1, 2))
    publisher.publish(2, stored(encoding, 2, 3, parent=1), stored(encoding, 2, medium="CPU"))
    publisher.publish(3, removed(encoding, 2), stored(encoding, 2, parent=1))
    before = len(follower.rows())
    seen = follower.wait_for(before + 7)
    publisher.publish(4, ["AllBlocksCleared"])
    assert len(seen) >= 7
    trace = follower.end(number)
    assert told(trace) == [
        ("store", 0, "gpu"),
        ("store", 1, "gpu"),
        ("touch", 1, "gpu"),
        ("store", 2, "gpu"),
        ("store", 1, "cpu"),
        ("remove", 1, "gpu"),
        ("store", 1, "gpu"),
        ("clear", None, None),
        ("clear", 0, "gpu"),
        ("clear", 2, "gpu"),
        ("clear", 1, "gpu"),
    ]
    blocks = trace.table("blocks").to_pylist()
    assert [(row["hash"], row["parent"], row["block_size"]) for row in blocks] == [
        ("1", None, 2),
        ("2", 0, 2),
        ("3", 1, 2),
    ]
    assert [row["token_ids"] for row in blocks] == [[10, 11], [20, 21], [30, 31]]
    assert json.loads(blocks[0]["details"]) == {"data_parallel_rank": 0, "topic": "kv-events"}
    names = [row["external_id"] for row in trace.table("requests").to_pylist()]
    assert names == (["chat-1"] if encoding == "map" else [])
    assert losses(trace) == []
    order = [row["ts_ns"] for row in trace.table("kv_events").to_pylist()]
    assert order == sorted(set(order))
    assert f"KV events of 3 blocks in {follower.out}" in follower.stderr


@pytest.mark.parametrize("replay_topic", [True, False])
def test_lost_messages_are_asked_for_and_what_nobody_has_is_a_gap(
    publishers: Callable[..., Publisher], follow: Callable[..., Follower], replay_topic: bool
) -> None:
    publisher = publishers(replay_topic=replay_topic)
    follower = follow(publisher, "--replay", publisher.replay)
    publisher.publish(1, stored("map", 1))
    publisher.publish(2, stored("map", 2, parent=1), send=False)
    publisher.publish(3, stored("map", 3, parent=2), send=False)
    publisher.publish(4, stored("map", 4, parent=3))
    publisher.publish(4, stored("map", 4, parent=3), keep=False, ts=1.0)
    publisher.publish(5, stored("map", 5, parent=4), send=False, keep=False)
    publisher.publish(6, stored("map", 6, parent=5))
    publisher.publish(7, stored("map", 7, parent=6), send=False)
    publisher.publish(8, stored("map", 8, parent=7))
    follower.wait_for(7 + 1)
    deadline = time.monotonic() + 100
    while len(follower.rows("blocks")) < 7 and time.monotonic() < deadline:
        time.sleep(0.05)
    trace = follower.end()
    stores = trace.sql(
        "select hash from kv_events join blocks using (block) where event = 'store' order by ts_ns"
    )
    assert stores["hash"].to_pylist() == ["1", "2", "3", "4", "6", "7", "8"]
    name = "publisher (topic kv-events, rank 0), sequence"
    why = "did not come, and the replay socket did not have them"
    assert losses(trace) == [(1, f"{name} 5: {why}")]
    # Block 5 is known as a parent.
    assert trace.table("blocks").num_rows == 8
    assert publisher.requests[0] == 2


def test_without_a_replay_socket_every_hole_is_a_gap(
    publishers: Callable[..., Publisher], follow: Callable[..., Follower]
) -> None:
    publisher = publishers()
    follower = follow(publisher)
    publisher.publish(3, stored("map", 1))
    publisher.send(b"kv-events", (4).to_bytes(8, "big"), b"\xc1")
    publisher.send(b"one frame")
    publisher.publish(5, {"type": "BlockInactive"}, stored("map", 2))
    follower.wait_for(1, "blocks")
    trace = follower.end()
    assert [event for event, *_ in told(trace)] == ["store", "store"]
    gaps = {row["reason"]: row["count"] for row in trace.table("gaps").to_pylist()}
    name = "publisher (topic kv-events, rank 0), sequence"
    expected = "did not come; --replay names a socket that may still have them"
    assert gaps == {
        f"{name} 1 to 2: {expected}": 2,
        "a payload that is no msgpack (message 4)": 1,
        "1 frames; topic, sequence and payload were expected": 1,
        "unknown event type BlockInactive (message 5)": 1,
    }
    assert "unknown event type BlockInactive" in follower.stderr


def test_a_replay_socket_that_is_not_there_delays_but_loses_nothing_else(
    publishers: Callable[..., Publisher],
    follow: Callable[..., Follower],
) -> None:
    publisher = publishers()
    follower = follow(publisher, "--replay", "tcp://127.0.0.1:9")
    publisher.publish(2, stored("map", 1))
    publisher.publish(3, stored("map", 2))
    follower.wait_for(2, "blocks")
    trace = follower.end()
    (loss,) = losses(trace)
    assert loss[1].endswith("did not come, and the replay socket did not answer")


def test_a_restarted_publisher_is_noted_and_its_blocks_are_gone(
    publishers: Callable[..., Publisher], follow: Callable[..., Follower]
) -> None:
    first = publishers()
    follower = follow(first)
    first.publish(1, stored("map", 1))
    first.publish(2, stored("map", 2, medium="STORAGE"))
    follower.wait_for(2, "blocks")
    first.close()
    second = publishers(first.ports)
    deadline = time.monotonic() + 100
    number = 0
    while not follower.rows("gaps"):
        assert time.monotonic() < deadline
        second.publish(number, stored("map", 1), stored("map", 2, medium="STORAGE"))
        number += 1
        time.sleep(0.2)
    trace = follower.end()
    assert told(trace)[:5] == [
        ("store", 0, "gpu"),
        ("store", 1, "storage"),
        ("clear", 0, "gpu"),
        ("store", 0, "gpu"),
        # What lies on a disk outlives its engine.
        ("touch", 1, "storage"),
    ]
    restarts = [r for r in trace.table("gaps").to_pylist() if r["what"] == "publisher restarts"]
    assert len(restarts) == 1
    assert "restarted: after message 2 came message" in restarts[0]["reason"]


def test_a_dump_of_a_stream_makes_the_same_trace(
    publishers: Callable[..., Publisher],
    follow: Callable[..., Follower],
    tmp_path: Path,
) -> None:
    publisher = publishers()
    dump = tmp_path / "events.msgpack"
    follower = follow(publisher, "--dump", str(dump), "--until-idle", "4")
    publisher.publish(1, stored("map", 1, 2))
    publisher.publish(3, removed("map", 2))
    trace = follower.ended()
    code = "import sys; from kvtrace.cli import main; sys.exit(main(sys.argv[1:]))"
    again = tmp_path / "again.kvtrace"
    words = ["import", "kv-events", str(dump), "--out", str(again)]
    subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True)
    for table in ("kv_events", "blocks", "requests"):
        assert kvtrace.open(again).table(table).equals(trace.table(table))


def test_a_killed_follower_leaves_what_it_committed(
    publishers: Callable[..., Publisher], follow: Callable[..., Follower]
) -> None:
    publisher = publishers()
    follower = follow(publisher)
    publisher.publish(1, stored("map", 1, 2))
    follower.wait_for(2, "blocks")
    assert kvtrace.open(follower.out).status == "recording"
    follower.kill()
    trace = kvtrace.open(follower.out)
    assert trace.status == "cut off"
    assert trace.sql("select count(*) n from blocks").to_pylist() == [{"n": 2}]


def test_nobody_there_is_said_and_waited_for(
    publishers: Callable[..., Publisher], tmp_path: Path
) -> None:
    publisher = publishers()
    publisher.close()
    follower = Follower(tmp_path / "late.kvtrace", publisher.endpoint)
    try:
        assert f"nobody answers at {publisher.endpoint} yet" in follower.line()
        _join(publishers(publisher.ports), follower)
        assert follower.end().table("kv_events").num_rows >= 1
    finally:
        follower.kill()


def test_publishers_may_connect_to_us(tmp_path: Path) -> None:
    """As llm-d does it: the subscriber binds."""
    with zmq.Context() as context, context.socket(zmq.PUB) as socket:
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        socket.unbind(f"tcp://127.0.0.1:{port}")
        follower = Follower(tmp_path / "bound.kvtrace", f"tcp://*:{port}")
        try:
            socket.connect(f"tcp://127.0.0.1:{port}")
            began = time.time()
            payload = msgpack.packb([began, [["AllBlocksCleared"]]])
            while not follower.rows():
                assert time.time() < began + 100
                socket.send_multipart([b"", (0).to_bytes(8, "big"), payload])
                time.sleep(0.05)
            assert follower.end().table("kv_events").num_rows == 1
        finally:
            follower.kill()


def test_following_needs_neither_torch_nor_the_models(tmp_path: Path) -> None:
    code = (
        "import sys; from kvtrace.cli import main;"
        "assert main(sys.argv[1:]) == 0;"
        "assert not {'torch', 'transformers', 'dash'} & set(sys.modules)"
    )
    words = ["import", "kv-events", "tcp://127.0.0.1:9", "--for", "0.3"]
    words += ["--out", str(tmp_path / "a.kvtrace")]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr
    assert "holds no rows and no KV events" in done.stderr
