"""How rows come off a device, in stand-ins for its streams: what runs late here, runs late there.

Work given to a stand-in stream is done when somebody waits for an event behind it, and no sooner.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.tiny import IDS, greedy
from transformers import DynamicCache, StaticCache

import kvtrace
from kvtrace_recorder import pipeline, record
from kvtrace_recorder.messages import Gap
from kvtrace_recorder.session import copies, decode, held, off_device, run_rows
from kvtrace_recorder.taps import keep
from kvtrace_recorder.writer.slabs import Slab, SlabPool
from kvtrace_recorder.writer.thread import WriterThread

CPU = torch.device("cpu")


class Stream:
    """Work in its order."""

    def __init__(self, device: Device, name: str) -> None:
        self.device, self.name, self.work = device, name, list[Callable[[], None]]()
        #: Does its work at once, as the host does that computes in place of the device.
        self.is_eager = False

    def give(self, what: str, work: Callable[[], None]) -> None:
        self.device.said.append(f"{self.name}: {what}")
        if self.is_eager:
            work()
        else:
            self.work.append(work)

    def wait_stream(self, other: Stream) -> None:
        event = Event(self.device)
        event.record(other)
        self.give(f"wait for {other.name}", event.reach)

    def wait_event(self, event: Event) -> None:
        self.give("wait for event", event.reach)

    def __enter__(self) -> None:
        self.device.current.append(self)

    def __exit__(self, *_: object) -> None:
        self.device.current.pop()


class Event:
    """All that a stream was given before."""

    def __init__(self, device: Device) -> None:
        self.device, self.stream, self.count = device, device.current[0], 0

    def record(self, stream: Stream) -> None:
        self.stream, self.count = stream, len(stream.work)

    def query(self) -> bool:
        return all(x is _done for x in self.stream.work[: self.count])

    def synchronize(self) -> None:
        name = threading.current_thread().name
        self.device.waits.append(name)
        if name == "kvtrace-send":
            self.device.sends.wait()
        self.reach()

    def reach(self) -> None:
        with self.device.lock:
            for at in range(self.count):
                work, self.stream.work[at] = self.stream.work[at], _done
                work()


def _done() -> None:
    """In place of work that was done."""


class Device(off_device.TorchCalls):
    """Torch's calls for a device whose tensors are the host's."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.waits: list[str] = []
        self.kept: list[tuple[int, ...]] = []
        self.lock = threading.RLock()
        self.refuses: str | None = None
        #: Cleared, the sending thread finds that nothing has arrived yet.
        self.sends = threading.Event()
        self.sends.set()
        self.model = Stream(self, "model")
        self.local = threading.local()

    @property
    def current(self) -> list[Stream]:
        """This thread's streams: another one's are none of the model's."""
        if not hasattr(self.local, "current"):
            mine = threading.current_thread() is threading.main_thread()
            self.local.current = [self.model if mine else Stream(self, "default")]
        found: list[Stream] = self.local.current
        return found

    def current_stream(self, device: torch.device) -> Any:
        return self.current[-1]

    def side_stream(self, device: torch.device) -> Any:
        return Stream(self, "side")

    def event(self, device: torch.device) -> Any:
        return Event(self)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        if self.refuses is not None:
            raise RuntimeError(self.refuses)
        return torch.full(tuple(shape), 77, dtype=dtype)

    def gather(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        found = torch.empty(values.shape, dtype=dtype)
        self.current[-1].give("gather", lambda: _into(found, values))
        return found

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.current[-1].give("copy", lambda: _into(target, source))

    def record(self, event: Any, stream: Any) -> None:
        self.said.append(f"{stream.name}: event")
        event.record(stream)

    def keep_for(self, values: torch.Tensor, stream: Any) -> None:
        self.said.append(f"{stream.name}: keep")
        self.kept.append(tuple(values.shape))

    def synchronize(self, device: torch.device) -> None:
        self.said.append("synchronize")


def _into(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """All tensors lie on a device."""
    found = Device()
    monkeypatch.setattr(off_device, "TorchCalls", lambda: found)
    for module in (keep, copies, run_rows, decode, off_device):
        monkeypatch.setattr(module, "is_off_host", lambda values: True)
    return found


@pytest.fixture
def slab() -> Iterator[Slab]:
    pool = SlabPool()
    yield pool.get(4096)
    pool.close()


def copied(copier: off_device.OffDevice, slab: Slab, values: torch.Tensor) -> Any:
    with copier.gathering(slab, [values], None):
        return keep.into_slab(values, slab, torch.float16)


def test_rows_are_gathered_after_the_model_s_work_and_copied_behind(
    device: Device, slab: Slab
) -> None:
    values = torch.zeros(3, 4)
    device.model.give("compute", lambda: _into(values, torch.ones(3, 4)))
    found = copied(off_device.OffDevice(), slab, values)
    assert device.said == [
        "model: compute",
        "side: wait for model",
        "side: gather",
        "side: keep",
        # What may write into `values` waits for this one.
        "side: event",
        "side: copy",
        "side: event",
    ]
    assert (device.waits, device.kept) == ([], [(3, 4)])
    slab.settle()
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, np.ones((3, 4)))


def test_what_writes_in_place_waits_for_the_gathering(device: Device, slab: Slab) -> None:
    copier, values = off_device.OffDevice(), torch.ones(3, 4)
    found = copied(copier, slab, values)
    copier.settle()
    device.model.give("overwrite", lambda: _into(values, torch.zeros(3, 4)))
    after = Event(device)
    after.record(device.model)
    after.synchronize()
    slab.settle()
    np.testing.assert_array_equal(found, np.ones((3, 4)))


def test_another_thread_waits_for_the_last_step_s_event_and_asks_nothing_of_the_model_s_stream(
    device: Device, slab: Slab
) -> None:
    copier, values = off_device.OffDevice(), torch.zeros(3, 4)
    device.model.give("compute", lambda: _into(values, torch.ones(3, 4)))
    ran = copier.ran([CPU])
    device.said.clear()
    found: list[Any] = []

    def tick() -> None:
        with copier.gathering(slab, [values], ran):
            found.append(keep.into_slab(values, slab))

    thread = threading.Thread(target=tick)
    thread.start()
    thread.join()
    assert device.said[0] == "side: wait for event"
    assert not any(word.startswith("model") for word in device.said)
    slab.settle()
    np.testing.assert_array_equal(found[0], np.ones((3, 4)))


def test_a_device_is_given_no_more_than_so_much_at_a_time(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(off_device, "UNDER_WAY_BYTES", 1000)
    copier, pool = off_device.OffDevice(), SlabPool()
    for _ in range(3):
        copied(copier, pool.get(600), torch.ones(3, 100))
    # The second and the third waited for the one before.
    assert len(device.waits) >= 2
    pool.close()


def test_without_pinned_memory_copies_are_as_a_cpu_s_and_that_is_said_once(
    device: Device, slab: Slab, capsys: pytest.CaptureFixture[str]
) -> None:
    device.refuses = "no pages"
    copier, values = off_device.OffDevice(), torch.ones(2, 2)
    for _ in range(3):
        np.testing.assert_array_equal(copied(copier, slab, values), np.ones((2, 2)))
    assert slab.arrival is None
    assert device.said == []
    assert capsys.readouterr().err.count("while the model waits: no memory could be pinned") == 1
    # Another thread has to wait for all that the model has given its stream.
    with copier.gathering(slab, [values], off_device.Ran(-1, {})):
        pass
    assert device.said == ["synchronize"]


def test_pinned_memory_that_ends_in_the_middle_loses_nothing(
    device: Device, slab: Slab, capsys: pytest.CaptureFixture[str]
) -> None:
    copier, values = off_device.OffDevice(), torch.ones(2, 2)
    copied(copier, slab, values)
    slab.settle()
    device.refuses = "no pages"

    def gather(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return values.to(dtype)

    # A blocking copy waits for its stream.
    device.gather = gather  # type: ignore[method-assign]
    found = copied(copier, slab, values)
    slab.settle()
    np.testing.assert_array_equal(found, np.ones((2, 2)))
    assert "no pages" in capsys.readouterr().err


def test_a_message_is_sent_and_its_slab_used_again_only_after_its_rows_are_there(
    device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Texts:
        def of(self, source: str, token_id: int) -> str | None:
            return None

    def refuse(options: dict[str, Any]) -> None:
        raise OSError

    sent = []
    monkeypatch.setattr(pipeline, "WriterProcess", refuse)
    monkeypatch.setattr(WriterThread, "send", lambda self, *message: sent.append(message))
    path = str(tmp_path / "a.kvtrace")
    made = pipeline.Pipeline(
        {"path": path}, Texts(), queue_bytes=1 << 20, on_full="wait", progress=False,
        on_tick=lambda: None,
    )  # fmt: skip
    slab = made.reserve(1000)
    assert slab is not None
    found = copied(off_device.OffDevice(), slab, torch.ones(2, 2))
    with device.lock:
        made.put(Gap("none", 1, "a message"), [slab])
        other = made.reserve(1000)
        assert other is not None
        assert other.number != slab.number
        assert sent == []
    made.give_back([other])
    made.close(complete=True)
    assert len(sent) == 1
    assert device.waits[-1] == "kvtrace-send"
    np.testing.assert_array_equal(found, np.ones((2, 2)))


def arrays(path: Path) -> list[Any]:
    trace = kvtrace.open(path)
    found: list[Any] = []
    for request in range(len(trace.requests())):
        for layer in range(2):
            data = trace.layer_data(layer, request)
            found += [data.q, data.k, data.v]
    return found


def run(model: Any) -> None:
    """A prompt, decoded tokens, batches, a large step, a crop, and a static cache used twice."""
    greedy(model)
    greedy(model, IDS.repeat(2, 1))
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.arange(80)[None] % 60, past_key_values=cache, use_cache=True)
        model(IDS, past_key_values=cache, use_cache=True)
        cache.crop(-3)
        for _ in range(3):
            model(IDS[:, :1], past_key_values=cache, use_cache=True)
        static = StaticCache(config=model.config, max_cache_len=32)
        for ids in (IDS, IDS + 1):
            static.reset()
            model(ids, past_key_values=static, use_cache=True)
            for _ in range(3):
                model(ids[:, :1], past_key_values=static, use_cache=True)


@pytest.mark.usefixtures("one_thread", "writer_thread")
@pytest.mark.parametrize("idle_ns", [0, 1 << 62])
def test_a_trace_is_that_of_synchronous_copies(
    idle_ns: int, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with record(model, tmp_path / "plain.kvtrace", dtype="float32", strict=True):
        run(model)
    with monkeypatch.context() as patched:
        found = Device()
        found.model.is_eager = True
        patched.setattr(off_device, "TorchCalls", lambda: found)
        for module in (keep, copies, run_rows, decode, off_device):
            patched.setattr(module, "is_off_host", lambda values: True)
        patched.setattr(held, "IDLE_NS", idle_ns)
        patched.setattr(pipeline, "TICK_SECONDS", 0.001)
        with record(model, tmp_path / "late.kvtrace", dtype="float32", strict=True) as recording:
            found.sends.clear()
            run(model)
            found.sends.set()
    assert recording.gaps == {}
    # The model's own thread waits for nothing.
    assert set(found.waits) == {"kvtrace-send"}
    plain, late = (arrays(tmp_path / f"{name}.kvtrace") for name in ("plain", "late"))
    assert len(plain) == len(late) > 6
    for one, other in zip(plain, late, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("one_thread", "writer_thread")
def test_a_step_that_writes_into_earlier_keys_waits_until_they_are_gathered(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Device
) -> None:
    """No method of the cache says so: a hook of a user's compresses it in place."""
    ids = torch.arange(80)[None] % 60
    cache = StaticCache(config=model.config, max_cache_len=96)
    kept: list[torch.Tensor] = []

    def compress(*_: object) -> None:
        if kept:
            cache.layers[0].keys.zero_()

    device.model.is_eager = True
    monkeypatch.setattr(pipeline, "TICK_SECONDS", 1000.0)
    hook = model.model.layers[0].register_forward_pre_hook(compress)
    path = tmp_path / "a.kvtrace"
    with record(model, path, dtype="float32", strict=True) as recording, torch.no_grad():
        device.sends.clear()
        model(ids, past_key_values=cache, use_cache=True)
        kept.append(cache.layers[0].keys[0, :, :80].clone())
        model(IDS, past_key_values=cache, use_cache=True)
        device.sends.set()
    hook.remove()
    assert recording.gaps == {}
    assert set(device.waits) == {"kvtrace-send"}
    found = kvtrace.open(path).layer_data(0).k
    assert found is not None
    np.testing.assert_array_equal(found[:80], kept[0].transpose(0, 1).numpy())


@pytest.mark.usefixtures("one_thread", "writer_thread")
def test_a_cpu_s_recording_asks_for_no_stream(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*args: Any) -> Any:
        raise AssertionError("a stream was asked for")

    for name in ("current_stream", "side_stream", "event", "pinned", "synchronize"):
        monkeypatch.setattr(off_device.TorchCalls, name, asked)
    slabs: list[Slab] = []
    original = pipeline.Pipeline.put

    def put(self: Any, message: Any, given: Sequence[Slab] = ()) -> None:
        slabs.extend(given)
        assert all(slab.arrival is None for slab in given)
        original(self, message, given)

    monkeypatch.setattr(pipeline.Pipeline, "put", put)
    with record(model, tmp_path / "a.kvtrace", strict=True) as recording:
        run(model)
    assert recording.gaps == {}
    assert slabs
