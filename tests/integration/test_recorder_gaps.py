"""What cannot be recorded is a gap, and nothing else is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.tiny import IDS, gaps, greedy

import kvtrace
from kvtrace_recorder import record

pytestmark = pytest.mark.usefixtures("one_thread", "writer_thread")


@pytest.mark.writer_process
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


@pytest.mark.writer_process
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
