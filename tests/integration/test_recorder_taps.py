"""Every tap there is, found by asking for the list: it puts back what it replaced, and an error in
it leaves the model alone. A new tap is held to this without a line here, as long as one of
`WORKLOADS` reaches it."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.tiny import llama
from torch.optim import optimizer as torch_optimizer
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import kvtrace
from kvtrace.errors import TraceError
from kvtrace_recorder import record, taps
from kvtrace_recorder.taps.guard import TapGuard
from kvtrace_recorder.taps.patch import Patch, PatchesAfterImport

#: Taps of continuous batching and of the server, which have threads and processes of their own
#: (test_recorder_batching.py, test_recorder_serve.py), and of a cache that leaves a GPU.
ELSEWHERE = {"paged_cache", "paged_offload", "serving", "offload"}
IDS = torch.tensor([[5, 9, 33, 12, 7, 8], [3, 9, 4, 12, 9, 4]])


pytestmark = pytest.mark.usefixtures("one_thread", "writer_thread")


def endless() -> Any:
    """Never ends a sequence by itself."""
    return llama(eos_token_id=None)


def generated(model: Any, **options: Any) -> list[torch.Tensor]:
    ids = options.pop("ids", IDS)
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, **options
    )
    return [found]


def trained(model: Any) -> list[torch.Tensor]:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    return [parameter.grad for parameter in model.parameters()]


def raising(model: Any) -> list[torch.Tensor]:
    with pytest.raises(IndexError):
        model(IDS + 100)
    return [model(IDS).logits]


def compiled(model: Any) -> list[torch.Tensor]:
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, backend="aot_eager")
    with torch.no_grad():
        found = [model(IDS).logits, model(IDS).logits]
    torch.compiler.reset()
    return found


def evaluated(model: Any) -> list[torch.Tensor]:
    # Without gradients `nn.MultiheadAttention` takes its fast path.
    with torch.no_grad():
        return [model.eval()(IDS), model(IDS)]


def bloom() -> Any:
    torch.manual_seed(1)
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0)
    return BloomForCausalLM(config).eval()


def t5() -> Any:
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=None,
    )
    return T5ForConditionalGeneration(config).eval()


class Plain(torch.nn.Module):
    """No model of transformers'."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = torch.nn.Embedding(64, 32)
        self.first = torch.nn.MultiheadAttention(32, 4, batch_first=True)
        self.second = torch.nn.Linear(32, 96)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + self.first(x, x, x, need_weights=False)[0]
        q, k, v = self.second(x).view(*ids.shape, 3, 4, 8).permute(2, 0, 3, 1, 4)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        found: torch.Tensor = x + y.transpose(1, 2).flatten(2)
        return found


Run = Callable[[Any], list[torch.Tensor]]
#: What makes a model (tiny, random weights), and what runs it.
WORKLOADS: dict[str, tuple[Callable[[], Any], Run]] = {
    "beams": (endless, lambda model: generated(model, num_beams=2)),
    "lookup": (endless, lambda model: generated(model, ids=IDS[1:], prompt_lookup_num_tokens=2)),
    "training": (endless, trained),
    "raising": (endless, raising),
    "compiled": (endless, compiled),
    "bloom": (bloom, generated),
    "t5": (t5, generated),
    "plain": (Plain, evaluated),
}


def run(name: str) -> list[torch.Tensor]:
    make, work = WORKLOADS[name]
    return work(make())


def recorded(name: str, path: Path, **options: Any) -> list[torch.Tensor]:
    make, work = WORKLOADS[name]
    model = make()
    with record(model, path, **options):
        return work(model)


def identical(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


# ---- what is put back


def places(model: Any, folder: Path) -> list[tuple[Any, str]]:
    """Owner and name of everything that a recording of this model replaces."""
    recording = record(model, folder / "places.kvtrace", force=True)
    with recording:
        found = [(p._owner, p._name) for p in flat(recording._patches)]
    assert found
    return found


def flat(patches: list[Any]) -> Iterator[Patch]:
    for patch in patches:
        if isinstance(patch, PatchesAfterImport):
            importlib.import_module(patch._waiting._name)
            yield from patch._patches
        elif isinstance(patch, Patch):
            yield patch


def state(where: list[tuple[Any, str]]) -> list[Any]:
    hooks = dict(torch_optimizer._global_optimizer_post_hooks)
    return [hooks, *(owner.__dict__.get(name, "absent") for owner, name in where)]


@pytest.mark.writer_process
@pytest.mark.parametrize("make", [endless, t5, Plain, lambda: None])
def test_everything_is_put_back_however_the_block_is_left(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    model = make()
    where = places(model, tmp_path)
    before = state(where)

    def leave(error: type[BaseException] | None, path: Path) -> None:
        with record(model, path, strict=True):
            assert all(x is not y for x, y in zip(state(where)[1:], before[1:], strict=True))
            inside = state(where)
            with pytest.raises(TraceError, match="one at a time"), record(model, tmp_path / "x"):
                pass
            assert state(where) == inside
            if error is not None:
                raise error

    for number, error in enumerate([None, ValueError, KeyboardInterrupt, SystemExit, None]):
        path = tmp_path / f"{number}.kvtrace"
        if error is None:
            leave(error, path)
        else:
            with pytest.raises(error):
                leave(error, path)
        assert state(where) == before
        assert kvtrace.open(path).status == ("complete" if error is None else "cut off")


def test_a_tap_that_cannot_be_installed_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = endless()
    where = places(model, tmp_path)
    before = state(where)
    originals = taps.patches
    for count in (0, len(where) // 2, len(where) - 1):

        class Broken(Patch):
            def apply(self) -> None:
                raise ZeroDivisionError("a patch")

        def patches(session: Any, count: int = count) -> list[Any]:
            found = originals(session)
            return [*found[:count], Broken(Patch, "none", lambda x: x), *found[count:]]

        monkeypatch.setattr(taps, "patches", patches)
        with pytest.raises(ZeroDivisionError), record(model, tmp_path / f"{count}.kvtrace"):
            raise AssertionError("the block was entered")
        assert state(where) == before


# ---- what an error does

Site = tuple[str, str]


class GuardSpy:
    """Sees which tap's code is run from where; makes one of them raise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: Counter[Site] = Counter()
        self.fails: Site | None = None
        self.failures = 0
        original = TapGuard.run

        def watched(guard: TapGuard, tap: str, call: Any, *args: Any, **kwargs: Any) -> Any:
            module = sys._getframe(1).f_globals["__name__"]
            site = (module.rpartition(".")[2], call.__name__)
            self.seen[site] += 1
            if site == self.fails:
                return original(guard, tap, self._fail)
            return original(guard, tap, call, *args, **kwargs)

        monkeypatch.setattr(TapGuard, "run", watched)

    def _fail(self) -> None:
        self.failures += 1
        raise ZeroDivisionError("in the tap")


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[Site, str]:
    """Where taps run code of theirs, and the first workload that gets there."""
    folder = tmp_path_factory.mktemp("sites")
    found: dict[Site, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        spy = GuardSpy(patch)
        for name in WORKLOADS:
            spy.seen.clear()
            recorded(name, folder / name, strict=True)
            for site in spy.seen:
                # The tick comes when it comes, in a thread of the pipeline's.
                if site[1] != "tick":
                    found.setdefault(site, name)
    return found


def test_the_workloads_reach_every_tap(sites: dict[Site, str]) -> None:
    files = {
        found.name
        for found in pkgutil.iter_modules(taps.__path__)
        if "guard.run(" in (Path(taps.__path__[0]) / f"{found.name}.py").read_text()
    }
    assert files - {module for module, _ in sites} <= ELSEWHERE


def test_a_tap_that_raises_is_silent_from_then_on_and_the_model_goes_on(
    sites: dict[Site, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    subtests: pytest.Subtests,
) -> None:
    plain = {name: run(name) for name in WORKLOADS}
    spy = GuardSpy(monkeypatch)
    for spy.fails, name in sites.items():
        with subtests.test(site=spy.fails, workload=name):
            spy.failures = 0
            path = tmp_path / "_".join(spy.fails)
            capfd.readouterr()
            assert identical(recorded(name, path), plain[name])
            assert spy.failures == 1
            reported = [x for x in capfd.readouterr().err.splitlines() if "went silent" in x]
            # Once as it happens; what the trace lacks for it is said at the end.
            assert sum("not recorded" not in line for line in reported) == 1
            trace = kvtrace.open(path)
            assert trace.status == "complete"
            found = [g for g in trace.table("gaps").to_pylist() if g["what"].endswith(" tap")]
            assert [g["count"] for g in found] == [1]
            assert "ZeroDivisionError: in the tap" in found[0]["reason"]


def test_strict_lets_it_through(
    sites: dict[Site, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    subtests: pytest.Subtests,
) -> None:
    spy = GuardSpy(monkeypatch)
    for spy.fails, name in sites.items():
        with subtests.test(site=spy.fails, workload=name):
            with pytest.raises(ZeroDivisionError, match="in the tap"):
                recorded(name, tmp_path / "_".join(spy.fails), strict=True)
            assert kvtrace.open(tmp_path / "_".join(spy.fails)).status == "cut off"
