"""A recorder is a guest: it restores what it patched and never breaks the model."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.tiny import IDS, gaps, greedy
from torch._dynamo.eval_frame import OptimizedModule
from transformers import LlamaForCausalLM
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

import kvtrace
from kvtrace.errors import InputError, TraceError
from kvtrace_recorder import record
from kvtrace_recorder.session.changes import CacheChanges
from kvtrace_recorder.session.decode import DecodeRun
from kvtrace_recorder.session.session import Session
from kvtrace_recorder.taps import compiled

PATCHED = [
    (PreTrainedModel, "__call__"),
    (AttentionInterface, "get_interface"),
    (torch, "softmax"),
    (PreTrainedModel, "get_compiled_call"),
    (OptimizedModule, "__call__"),
    (compiled, "_session"),
    (torch, "_native_multi_head_attention"),
    (torch, "_transformer_encoder_layer_fwd"),
    (torch.nn.functional, "_in_projection"),
    (torch.nn.functional, "_in_projection_packed"),
    (torch.nn.functional, "softmax"),
    (torch.nn.functional, "scaled_dot_product_attention"),
    (Cache, "crop"),
    (Cache, "reorder_cache"),
    (Cache, "batch_repeat_interleave"),
    (Cache, "batch_select_indices"),
    (CacheLayerMixin, "offload"),
    (CacheLayerMixin, "prefetch"),
]


def patched_state() -> list[Any]:
    return [owner.__dict__.get(name, "absent") for owner, name in PATCHED]


pytestmark = pytest.mark.usefixtures("one_thread", "writer_thread")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = patched_state()
    yield
    assert patched_state() == before


@pytest.mark.writer_process
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_everything_is_restored_and_the_trace_kept_after_an_exception(
    error: type[BaseException], model: Any, tmp_path: Path
) -> None:
    before = patched_state()

    def interrupted() -> None:
        with record(model, tmp_path / "a.kvtrace"):
            assert patched_state() != before
            greedy(model)
            raise error

    with pytest.raises(error):
        interrupted()
    assert patched_state() == before
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert (trace.status, trace.rows) == ("cut off", 11)


@pytest.mark.parametrize(
    ("owner", "tap"),
    [(Session, "begin"), (Session, "attention"), (Session, "end"), (CacheChanges, "after")],
)
def test_a_tap_that_raises_goes_silent_and_the_model_goes_on(
    owner: type,
    tap: str,
    model: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = greedy(model, num_beams=2)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("in the tap")

    monkeypatch.setattr(owner, tap, fail)
    with record(model, tmp_path / "a.kvtrace"):
        assert torch.equal(greedy(model, num_beams=2), plain)
        assert torch.equal(greedy(model, num_beams=2), plain)
    assert capsys.readouterr().err.count("in the tap") >= 1
    found = [g for g in gaps(tmp_path / "a.kvtrace") if "tap" in g["what"]]
    assert len(found) == 1
    assert "ZeroDivisionError: in the tap" in found[0]["reason"]


def test_a_tap_that_raises_in_the_middle_keeps_what_came_before(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = DecodeRun.saw, [0]

    def fail_later(*args: Any) -> bool:
        calls[0] += 1
        if calls[0] > 3:
            raise ZeroDivisionError("in the tap")
        return original(*args)

    monkeypatch.setattr(DecodeRun, "saw", fail_later)
    with record(model, tmp_path / "a.kvtrace"):
        greedy(model)
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    # Three whole steps, the third the first of a run; the steps themselves are all there.
    assert (trace.rows, trace.table("steps").num_rows) == (8, 6)
    assert sum(g["count"] for g in gaps(tmp_path / "a.kvtrace") if g["what"] == "tokens") == 3


def test_strict_raises(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise ZeroDivisionError("in the tap")

    monkeypatch.setattr(Session, "attention", fail)
    with (
        pytest.raises(ZeroDivisionError, match="in the tap"),
        record(model, tmp_path / "a.kvtrace", strict=True),
    ):
        greedy(model)


@pytest.mark.writer_process
def test_one_recording_at_a_time(model: Any, tmp_path: Path) -> None:
    with record(model, tmp_path / "a.kvtrace") as first:
        with (
            pytest.raises(TraceError, match="one at a time"),
            record(model, tmp_path / "b.kvtrace"),
        ):
            pass
        greedy(model)
    with pytest.raises(TraceError, match="entered before"), first:
        pass
    assert not (tmp_path / "b.kvtrace").exists()
    with record(model, tmp_path / "b.kvtrace"):
        greedy(model)
    assert kvtrace.open(tmp_path / "b.kvtrace").rows == kvtrace.open(tmp_path / "a.kvtrace").rows


def test_bad_arguments_are_refused_before_anything_is_made(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.kvtrace"
    with pytest.raises(InputError, match="on_full 'never'"):
        record(model, path, on_full="never")
    with pytest.raises(InputError, match=r"a str was given; a torch.nn.Module was expected"):
        record("a-model", path)
    bad: list[dict[str, Any]] = [{"detail": "all"}, {"dtype": "int8"}]
    for options in bad:
        with pytest.raises(InputError, match="was expected"), record(model, path, **options):
            pass
    assert not path.exists()


def test_an_existing_trace_is_replaced_only_by_force(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.kvtrace"
    with record(model, path):
        greedy(model)
    with pytest.raises(TraceError, match="--force"), record(model, path):
        pass
    with record(model, path, force=True):
        greedy(model, max_new_tokens=2)
    assert kvtrace.open(path).rows == 7


def test_any_model_is_recorded_when_none_is_named(model: Any, tmp_path: Path) -> None:
    other = LlamaForCausalLM(model.config).eval()
    with record(None, tmp_path / "a.kvtrace", strict=True):
        greedy(model)
        greedy(other, max_new_tokens=3)
        model.model(IDS)
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert [(r.model, r.tokens) for r in trace.requests()] == [(0, 11), (1, 8), (2, 6)]
    assert trace.sql("select architecture from models order by model").to_pylist() == [
        {"architecture": "LlamaForCausalLM"},
        {"architecture": "LlamaForCausalLM"},
        {"architecture": "LlamaModel"},
    ]


def test_only_the_named_model_is_recorded(model: Any, tmp_path: Path) -> None:
    other = LlamaForCausalLM(model.config).eval()
    with record(model, tmp_path / "a.kvtrace", strict=True):
        greedy(other)
        greedy(model)
    assert len(kvtrace.open(tmp_path / "a.kvtrace").requests()) == 1


def test_a_model_in_another_thread_is_recorded(model: Any, tmp_path: Path) -> None:
    with record(model, tmp_path / "a.kvtrace", strict=True):
        threads = [threading.Thread(target=greedy, args=(model,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [r.tokens for r in kvtrace.open(tmp_path / "a.kvtrace").requests()] == [11, 11, 11]


def test_two_models_may_take_turns(model: Any, tmp_path: Path) -> None:
    other = LlamaForCausalLM(model.config).eval()
    with record(None, tmp_path / "a.kvtrace", strict=True, dtype="float32"), torch.no_grad():
        caches: list[Any] = [None, None]
        for step in range(4):
            for number, each in enumerate((model, other)):
                ids = IDS if step == 0 else IDS[:, step : step + 1]
                caches[number] = each(ids, past_key_values=caches[number]).past_key_values
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert [(r.model, r.tokens) for r in trace.requests()] == [(0, 9), (1, 9)]
    for request, each in enumerate((model, other)):
        ids = torch.cat([IDS, IDS[:, 1:4]], dim=1)
        each.set_attn_implementation("eager")
        with torch.no_grad():
            expected = each(ids, output_attentions=True).attentions[1][0, 2].numpy()
        np.testing.assert_allclose(trace.attention(1, 2, request=request), expected, atol=1e-5)


@pytest.mark.writer_process
def test_threads_with_models_of_their_own(model: Any, tmp_path: Path) -> None:
    models = [model, LlamaForCausalLM(model.config).eval()]
    plain = [greedy(each) for each in models]
    found: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def run(number: int) -> None:
        for _ in range(3):
            found[number].append(greedy(models[number]))

    with record(None, tmp_path / "a.kvtrace", strict=True):
        threads = [threading.Thread(target=run, args=(number,)) for number in found]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, outputs in found.items():
        assert all(torch.equal(output, plain[number]) for output in outputs)
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert Counter((r.model, r.tokens) for r in trace.requests()) == {(0, 11): 3, (1, 11): 3}
    for request in trace.requests():
        output = trace.tokens(request.request)["token_id"].to_pylist()
        assert output in [each[0, :11].tolist() for each in plain]


@pytest.mark.parametrize("way", ["inference_mode", "autocast", "warnings", "deepcopy", "pickle"])
def test_whatever_a_program_runs_under(way: str, model: Any, tmp_path: Path) -> None:
    def run() -> list[torch.Tensor]:
        if way == "inference_mode":
            with torch.inference_mode():
                return [greedy(model), model(IDS).logits]
        if way == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
                return [greedy(model), model(IDS).logits]
        if way == "warnings":
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                return [greedy(model), model(IDS).logits]
        copied = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))  # noqa: S301
        return [greedy(copied), copied(IDS).logits, greedy(model)]

    plain = run()
    with record(None, tmp_path / "a.kvtrace", strict=True) as recording:
        found = run()
    assert all(torch.equal(x, y) for x, y in zip(found, plain, strict=True))
    assert recording.gaps == {}
    tokens = [r.tokens for r in kvtrace.open(tmp_path / "a.kvtrace").requests()]
    assert tokens == [11, 6, 11][: len(plain)]
