"""Fixtures of the tests that run models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.support.batching import Snapshots


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let torch compute in one thread: the machine's others belong to other tests."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def writer_thread(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the writer be a thread, as where no process can be started.

    It can be patched, and starts at once: for tests of what is recorded rather than of how it
    reaches the trace. Some of each area are marked `writer_process` all the same.
    """
    if request.node.get_closest_marker("writer_process") is not None:
        return
    from kvtrace_recorder import pipeline

    def refuse(options: dict[str, Any]) -> None:
        raise OSError("no processes here")

    monkeypatch.setattr(pipeline, "WriterProcess", refuse)


@pytest.fixture
def model() -> Any:
    """A tiny Llama with random weights."""
    from tests.support.tiny import llama

    return llama()


@pytest.fixture
def batching_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail where a recording left something of transformers' continuous batching patched."""
    from tests.support.batching import PATCHED

    def state() -> list[Any]:
        return [vars(kind).get(name) for kind, names in PATCHED.items() for name in names]

    before = state()
    yield
    # What the test itself patched.
    monkeypatch.undo()
    assert state() == before


@pytest.fixture
def snapshots(monkeypatch: pytest.MonkeyPatch) -> Snapshots:
    """The block tables of the continuous batching that the test runs."""
    from tests.support.batching import Snapshots, tables_of
    from transformers.generation.continuous_batching.cache import PagedAttentionCache
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor

    taken = Snapshots()
    step, free = ContinuousBatchProcessor._generation_step, PagedAttentionCache.free_blocks

    def at_step(self: Any, *args: Any) -> Any:
        taken.steps.append(tables_of(self.cache))
        return step(self, *args)

    def at_release(self: Any, *args: Any, **kwargs: Any) -> None:
        free(self, *args, **kwargs)
        taken.releases.append(tables_of(self))

    monkeypatch.setattr(ContinuousBatchProcessor, "_generation_step", at_step)
    monkeypatch.setattr(PagedAttentionCache, "free_blocks", at_release)
    return taken
