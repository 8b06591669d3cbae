"""A recorder is a guest: it restores what it patched and never breaks the model."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.eval_frame import OptimizedModule
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

import kvtrace
from kvtrace.errors import InputError, TraceError
from kvtrace_recorder import pipeline, record
from kvtrace_recorder.scribe import Scribe
from kvtrace_recorder.session import held
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


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before, threads = patched_state(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    assert patched_state() == before


@pytest.fixture
def model() -> Any:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


IDS = torch.tensor([[5, 9, 33, 12, 7, 8]])


def greedy(model: Any, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    given = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    found: torch.Tensor = model.generate(ids, **{**given, "eos_token_id": None, **options})
    return found


def gaps(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = kvtrace.open(path).table("gaps").to_pylist()
    return found


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


def test_a_forward_pass_that_raises_is_a_gap_and_ends_its_request(
    model: Any, tmp_path: Path
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("a layer of the user's")

    with record(model, tmp_path / "a.kvtrace", strict=True):
        cache = model(IDS).past_key_values
        handle = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="of the user's"):
            model(IDS[:, :1], past_key_values=cache)
        handle.remove()
        model(IDS[:, :2])
    assert [(g["count"], g["reason"]) for g in gaps(tmp_path / "a.kvtrace")] == [
        (1, "the forward pass raised")
    ]
    assert [r.tokens for r in kvtrace.open(tmp_path / "a.kvtrace").requests()] == [6, 2]


@pytest.mark.parametrize("tap", ["begin", "attention", "end", "cache_changed"])
def test_a_tap_that_raises_goes_silent_and_the_model_goes_on(
    tap: str,
    model: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = greedy(model, num_beams=2)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("in the tap")

    monkeypatch.setattr(Session, tap, fail)
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
    original, calls = Session.attention, [0]

    def fail_later(*args: Any) -> None:
        calls[0] += 1
        if calls[0] > 5:
            raise ZeroDivisionError("in the tap")
        original(*args)

    monkeypatch.setattr(Session, "attention", fail_later)
    with record(model, tmp_path / "a.kvtrace"):
        greedy(model)
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    # Two whole steps of two layers each; the steps themselves are all there.
    assert (trace.rows, trace.table("steps").num_rows) == (7, 6)
    assert sum(g["count"] for g in gaps(tmp_path / "a.kvtrace") if g["what"] == "tokens") == 4


def test_strict_raises(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise ZeroDivisionError("in the tap")

    monkeypatch.setattr(Session, "attention", fail)
    with (
        pytest.raises(ZeroDivisionError, match="in the tap"),
        record(model, tmp_path / "a.kvtrace", strict=True),
    ):
        greedy(model)


@pytest.fixture
def writer_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the writer be a thread, as where no process can be started: it can be patched."""

    def refuse(options: dict[str, Any]) -> None:
        raise OSError("no processes here")

    monkeypatch.setattr(pipeline, "WriterProcess", refuse)


@pytest.mark.usefixtures("writer_thread")
def test_a_thread_writes_where_no_process_can_be_started(model: Any, tmp_path: Path) -> None:
    with record(model, tmp_path / "a.kvtrace", strict=True) as recording:
        greedy(model)
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert (trace.status, trace.rows, recording.rows) == ("complete", 11, 11)
    np.testing.assert_allclose(trace.attention(1, 3).sum(axis=1), 1, atol=1e-5)


def test_a_writer_process_that_is_killed_leaves_the_model_alone(
    model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = greedy(model)
    with record(model, tmp_path / "a.kvtrace", on_full="wait") as recording:
        greedy(model)
        while recording.rows < 11:
            time.sleep(0.01)
        time.sleep(0.5)
        os.kill(recording.writer_pid or 0, signal.SIGKILL)
        assert torch.equal(greedy(model), plain)
        time.sleep(0.2)
        assert torch.equal(greedy(model), plain)
    assert "writer's process ended before the recording" in capsys.readouterr().err
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert (trace.status, trace.rows) == ("cut off", 11)


def test_a_trace_that_cannot_be_written_any_more_leaves_the_model_alone(
    model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = greedy(model)
    tables = tmp_path / "a.kvtrace" / "rank-00000" / "tables"
    with record(model, tmp_path / "a.kvtrace"):
        shutil.rmtree(tables, ignore_errors=True)
        tables.write_text("in the way")
        assert torch.equal(greedy(model), plain)
    assert f"writing {tmp_path / 'a.kvtrace'} failed: " in capsys.readouterr().err


@pytest.mark.usefixtures("writer_thread")
def test_a_writer_that_fails_leaves_the_model_alone(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    plain = greedy(model)
    monkeypatch.setattr(Scribe, "write", full)
    with record(model, tmp_path / "a.kvtrace", on_full="wait"):
        assert torch.equal(greedy(model), plain)
    assert "No space left on device" in capsys.readouterr().err
    with (
        pytest.raises(TraceError, match="No space left"),
        record(model, tmp_path / "b.kvtrace", strict=True),
    ):
        greedy(model)


class _Brake:
    """Holds the writer thread until released."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        original = Scribe.write

        def write(*args: Any) -> None:
            self.go.wait()
            original(*args)

        monkeypatch.setattr(Scribe, "write", write)


@pytest.mark.usefixtures("writer_thread")
def test_a_full_queue_drops_whole_steps_and_says_so(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brake = _Brake(monkeypatch)
    monkeypatch.setattr(held, "STEPS", 1)
    with record(model, tmp_path / "a.kvtrace", queue_bytes=2000) as recording:
        greedy(model)
        brake.go.set()
        while recording.steps < 6:
            time.sleep(0.01)
        greedy(model, max_new_tokens=1)
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    first, second = trace.requests()
    assert 6 <= first.tokens < 11
    assert second.tokens == 6
    lost = 11 - first.tokens
    (gap,) = gaps(tmp_path / "a.kvtrace")
    assert (gap["what"], gap["count"]) == ("tokens", lost)
    assert "whole steps are dropped" in gap["reason"]
    assert recording.dropped_tokens >= 1
    assert trace.table("steps").num_rows == 7
    assert trace.attention(1, 3).shape == (first.tokens, first.tokens)


@pytest.mark.usefixtures("writer_thread")
def test_on_full_wait_loses_nothing(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brake = _Brake(monkeypatch)
    threading.Timer(0.3, brake.go.set).start()
    with record(model, tmp_path / "a.kvtrace", queue_bytes=6000, on_full="wait") as recording:
        greedy(model)
    assert (recording.rows, recording.gaps) == (11, {})


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


def test_a_cache_that_was_filled_before_is_a_gap(model: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        cache = model(IDS).past_key_values
        with record(model, tmp_path / "a.kvtrace", strict=True):
            model(IDS[:, :1], past_key_values=cache)
    (gap,) = gaps(tmp_path / "a.kvtrace")
    assert gap["reason"] == "the cache already held 6 tokens when it was first seen"


def test_a_mask_that_is_not_causal_is_a_gap(model: Any, tmp_path: Path) -> None:
    packed = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    packed[0, 0, :3, :3] = torch.ones(3, 3).tril().bool()
    packed[0, 0, 3:, 3:] = torch.ones(3, 3).tril().bool()
    with record(model, tmp_path / "a.kvtrace", strict=True), torch.no_grad():
        model(IDS, attention_mask=packed)
        model(IDS[:, :3], attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool))
    # Earlier tokens hidden, and later ones shown.
    (gap,) = gaps(tmp_path / "a.kvtrace")
    assert gap["count"] == 6 + 3
    assert "is not that of full attention" in gap["reason"]
    assert kvtrace.open(tmp_path / "a.kvtrace").rows == 0


def test_what_cannot_be_told_apart_is_not_recorded(
    model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with record(model, tmp_path / "a.kvtrace", strict=True) as recording, torch.no_grad():
        model(IDS, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    (reason,) = recording.gaps
    assert "several sequences packed into one" in reason
    assert "several sequences packed into one" in capsys.readouterr().err
    with record(model, tmp_path / "b.kvtrace"):
        pass
    assert "nothing was recorded: the LlamaForCausalLM did not run" in capsys.readouterr().err


def test_a_forward_compiled_by_its_own_is_recorded_and_may_go_while_it_is(
    model: Any, tmp_path: Path
) -> None:
    with torch.no_grad():
        plain = model(IDS).logits
        model.forward = torch.compile(model.forward, backend="aot_eager")
        compiled = model(IDS).logits
        with record(model, tmp_path / "a.kvtrace", strict=True) as recording:
            assert torch.equal(model(IDS).logits, compiled)
            del model.forward
            assert torch.equal(model(IDS).logits, plain)
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert (trace.status, trace.rows, len(trace.layers)) == ("complete", 12, 2)
    assert recording.gaps == {}
    torch._dynamo.reset()


def test_rows_that_have_ended_are_not_fed_into_the_trace(model: Any, tmp_path: Path) -> None:
    ids = IDS.repeat(2, 1)
    ids[1, 0] = 40
    plain = greedy(model, ids, eos_token_id=None)
    stop = int(plain[0, 7])
    model.generation_config.eos_token_id = stop
    with record(model, tmp_path / "a.kvtrace", strict=True):
        out = greedy(model, ids, eos_token_id=stop)
    ended = out[0].tolist().index(stop) + 1
    assert out[0, ended:].tolist() == [0] * (out.shape[1] - ended)
    assert kvtrace.open(tmp_path / "a.kvtrace").requests()[0].tokens == ended


def test_events_only(model: Any, tmp_path: Path) -> None:
    with record(model, tmp_path / "a.kvtrace", detail="events", strict=True):
        greedy(model)
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert (trace.rows, trace.signals, len(trace.layers)) == (11, frozenset(), 2)
    assert not any(trace.table("rows")["has_query"].to_pylist())


def test_training_is_recorded_without_changing_the_gradient(model: Any, tmp_path: Path) -> None:
    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        return model.lm_head.weight.grad.clone()  # type: ignore[no-any-return]

    model.train()
    model.activation_checkpointing_enable()
    plain = gradient()
    with record(model, tmp_path / "a.kvtrace", strict=True) as recording:
        assert torch.equal(gradient(), plain)
    assert (recording.rows, recording.gaps) == (6, {})


def test_events_alone_hold_every_token_and_no_gap(model: Any, tmp_path: Path) -> None:
    with record(model, tmp_path / "a.kvtrace", detail="events", strict=True) as recording:
        greedy(model, max_new_tokens=80)
        greedy(model)
    assert recording.gaps == {}
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert (trace.status, [r.tokens for r in trace.requests()]) == ("complete", [85, 11])
    assert len(trace.layers) == 2
    assert trace.sql("select max(bytes) n from kv_events").to_pylist() == [
        {"n": 85 * 2 * 2 * 8 * 4}
    ]
    # Every step of either layer makes it larger, the plain ones and those looked at closely.
    grown = trace.sql("select count(*) n from kv_events where event = 'grow'")
    assert grown.to_pylist() == [{"n": 2 * (80 + 6)}]


@pytest.mark.usefixtures("writer_thread")
@pytest.mark.timeout(60)
def test_threads_that_wait_for_a_slow_writer_do_not_wait_for_ever(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Scribe.write

    def slow(*args: Any) -> None:
        time.sleep(0.03)
        original(*args)

    monkeypatch.setattr(Scribe, "write", slow)
    monkeypatch.setattr(held, "STEPS", 4)
    monkeypatch.setattr(pipeline, "TICK_SECONDS", 0.005)
    others = [LlamaForCausalLM(model.config).eval() for _ in range(3)]
    path = tmp_path / "a.kvtrace"
    with record(None, path, queue_bytes=2000, on_full="wait", strict=True) as recording:
        threads = [
            threading.Thread(target=greedy, args=(other,), kwargs={"max_new_tokens": 40})
            for other in others
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (recording.rows, recording.gaps) == (3 * 45, {})


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
