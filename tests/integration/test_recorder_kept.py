"""What is kept: a thinned recording holds its part of the full one of the same run, and says so.

The models are tiny and random: what is tested is which numbers are kept, bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import tiny
from tests.support.tiny import SHARP, SIZES
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
)

import kvtrace
from kvtrace import Trace
from kvtrace.cli import main
from kvtrace_recorder import record
from kvtrace_recorder.session import copies, off_device, run_rows
from kvtrace_recorder.session.held_lse import held_lse
from kvtrace_recorder.taps import keep
from kvtrace_viewer.replay import replay

PROMPT, NEW = 100, 5


pytestmark = pytest.mark.usefixtures("one_thread", "writer_thread")


def llama(layers: int = 3) -> Any:
    return tiny.llama(**SHARP, num_hidden_layers=layers)


def gemma() -> Any:
    """Softcap, and a window in every second layer."""
    torch.manual_seed(1)
    config = Gemma2Config(**SIZES, **SHARP, sliding_window=24)
    return Gemma2ForCausalLM(config).eval()


def gpt_oss() -> Any:
    """Learned sinks, and a window in every second layer."""
    torch.manual_seed(1)
    config = GptOssConfig(
        **SIZES,
        **SHARP,
        sliding_window=24,
        num_local_experts=2,
        num_experts_per_tok=1,
        attn_implementation="eager",
    )
    return GptOssForCausalLM(config).eval()


def prompt(batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, 64, (batch, PROMPT), generator=generator)


def run(model: Any, path: Path, **options: Any) -> tuple[Trace, torch.Tensor]:
    """Generate from one prompt; from two where `mask` hides the padding of one."""
    mask, chunk = options.pop("mask", None), options.pop("chunk", None)
    ids = prompt() if mask is None else prompt(len(mask))
    with record(model, path, progress=False, **options):
        tokens = model.generate(
            ids,
            attention_mask=torch.ones_like(ids) if mask is None else mask,
            max_new_tokens=NEW + 1,
            do_sample=False,
            eos_token_id=None,
            prefill_chunk_size=chunk,
        )
    return kvtrace.open(path), tokens


def received(full: Trace, layer: int, request: int = 0) -> np.ndarray[Any, Any]:
    """[key, q_head]: column sums of the prompt's rows of the full trace."""
    (found,) = (one for one in full.requests() if one.request == request)
    heads = next(spec for spec in full.layers if spec.layer == layer).q_head_numbers
    part = slice(0, found.prompt_tokens)
    return np.stack(
        [full.attention(layer, h, part, part, request).sum(axis=0) for h in heads], axis=1
    )


@pytest.mark.writer_process
@pytest.mark.parametrize(
    ("make", "dtype"), [(llama, "float16"), (gemma, "float32"), (gpt_oss, "float16")]
)
def test_the_last_queries_and_received(make: Any, dtype: str, tmp_path: Path) -> None:
    model = make()
    full, one = run(model, tmp_path / "full.kvtrace", dtype=dtype)
    less, other = run(model, tmp_path / "less.kvtrace", dtype=dtype, queries="last=20")
    assert torch.equal(one, other)
    assert (full.queries, less.queries) == ("all", "last=20")
    assert less.selection["queries"] == "last=20"
    assert not less.table("gaps").num_rows
    for spec in full.layers:
        a, b = full.layer_data(spec.layer), less.layer_data(spec.layer)
        assert a.q is not None
        assert b.q is not None
        assert a.received is None
        np.testing.assert_array_equal(a.k, b.k)
        np.testing.assert_array_equal(a.v, b.v)
        np.testing.assert_array_equal(a.q[PROMPT - 20 :], b.q[PROMPT - 20 :])
        assert np.isnan(b.q[: PROMPT - 20]).all()
        np.testing.assert_allclose(a.lse[PROMPT - 20 :], b.lse[PROMPT - 20 :], atol=1e-5)  # type: ignore[index]
        assert b.received is not None
        np.testing.assert_allclose(b.received[:PROMPT], received(full, spec.layer), atol=1e-4)
        assert np.isnan(b.received[PROMPT:]).all()


def test_every_nth_query_of_a_padded_batch(tmp_path: Path) -> None:
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, :37] = 0
    full, _ = run(llama(), tmp_path / "full.kvtrace", mask=mask)
    less, _ = run(llama(), tmp_path / "less.kvtrace", mask=mask, queries="every=10")
    assert less.queries == "every=10"
    for request, tokens in ((0, PROMPT), (1, PROMPT - 37)):
        held = less.holdings(request)
        kept = {*range(0, tokens, 10), tokens - 1, *range(tokens, tokens + NEW)}
        assert np.flatnonzero(held.queries).tolist() == sorted(kept)
        for layer in range(3):
            a, b = (
                full.attention(layer, 3, request=request),
                less.attention(layer, 3, request=request),
            )
            np.testing.assert_allclose(a[held.queries], b[held.queries], atol=1e-5)
            found = less.layer_data(layer, request).received
            assert found is not None
            np.testing.assert_allclose(found[:tokens], received(full, layer, request), atol=1e-4)


@pytest.mark.writer_process
def test_chosen_layers_and_heads(tmp_path: Path) -> None:
    full, _ = run(llama(4), tmp_path / "full.kvtrace", dtype="float32")
    path = tmp_path / "some.kvtrace"
    some, _ = run(llama(4), path, dtype="float32", layers="1,3", heads=[1], queries="last=9")
    assert [spec.layer for spec in some.layers] == [1, 3]
    assert [spec.kv_heads for spec in some.layers] == [[1], [1]]
    for layer in (1, 3):
        a, b = full.layer_data(layer), some.layer_data(layer)
        np.testing.assert_array_equal(a.k[:, 1:], b.k)  # type: ignore[index]
        np.testing.assert_array_equal(a.v[:, 1:], b.v)  # type: ignore[index]
        np.testing.assert_allclose(
            full.attention(layer, 3, slice(95, None)),
            some.attention(layer, 3, slice(95, None)),
            atol=1e-6,
        )
        want = received(full, layer)[:, 2:]
        np.testing.assert_allclose(b.received[:PROMPT], want, atol=1e-4)  # type: ignore[index]
    found, want_kept = (replay(x, ["h2o"], ["20"], store=False)[0].kept() for x in (some, full))
    for layer in (1, 3):
        np.testing.assert_array_equal(found[layer][1], want_kept[layer][1])


def test_heads_and_layers_that_are_not_there_are_named(tmp_path: Path) -> None:
    trace, _ = run(llama(), tmp_path / "a.kvtrace", heads="7")
    assert not trace.rows
    reasons = trace.table("gaps")["reason"].to_pylist()
    assert "KV heads 7 were asked for; layer 0 has 0-1" in reasons[0]
    trace, _ = run(llama(), tmp_path / "b.kvtrace", layers="1,9")
    assert [spec.layer for spec in trace.layers] == [1]
    reasons = trace.table("gaps")["reason"].to_pylist()
    assert any("layers 9 were asked for; LlamaForCausalLM has 0-2" in x for x in reasons)
    trace, _ = run(llama(), tmp_path / "c.kvtrace", layers="9")
    [reason] = trace.table("gaps")["reason"].to_pylist()
    assert "layers 9 were asked for; LlamaForCausalLM has 0-2" in reason


def test_a_prompt_in_chunks_is_one_prompt(tmp_path: Path) -> None:
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, :37] = 0
    full, one = run(llama(), tmp_path / "full.kvtrace", mask=mask)
    path = tmp_path / "less.kvtrace"
    less, other = run(llama(), path, mask=mask, queries="last=20", chunk=33)
    assert torch.equal(one, other)
    assert less.queries == "last=20"
    for request, tokens in ((0, PROMPT), (1, PROMPT - 37)):
        assert less.requests()[request].prompt_tokens == tokens
        sources = less.tokens(request)["source"].to_pylist()
        assert sources == ["prompt"] * tokens + ["generated"] * NEW
        for layer in range(3):
            found = less.layer_data(layer, request).received
            assert found is not None
            np.testing.assert_allclose(found[:tokens], received(full, layer, request), atol=1e-4)
    results = (replay(x, ["h2o"], ["25"], store=False, requests=[0])[0] for x in (less, full))
    kept, want = (result.kept(0) for result in results)
    for layer, heads in want.items():
        for head, positions in heads.items():
            np.testing.assert_array_equal(kept[layer][head], positions)


def test_a_repeated_prompt_has_no_received(tmp_path: Path) -> None:
    """A prompt that was cropped and repeated has been summed over too much: nobody uses it."""
    model, ids = llama(), prompt()
    traces = []
    for name, queries in (("full", "all"), ("less", "every=10")):
        with record(model, tmp_path / f"{name}.kvtrace", queries=queries, progress=False):
            cache = model(ids[:, :60]).past_key_values
            model(ids[:, 60:61], past_key_values=cache)
            again = model(ids[:, :60]).past_key_values
            again.crop(-20)
            model(ids[:, 40:], past_key_values=again)
        traces.append(kvtrace.open(tmp_path / f"{name}.kvtrace"))
    full, less = traces
    found = less.layer_data(1, 0).received
    assert found is not None
    np.testing.assert_allclose(found[:60], received(full, 1), atol=1e-4)
    assert "received" in less.holdings(0).layers[1]
    assert "received" not in less.holdings(1).layers[1]


def test_the_command_line_takes_the_same_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.kvtrace"
    words = [
        "--layers",
        "0,2-3",
        "--heads",
        "1",
        "--queries",
        "last=4",
        "--max-bytes",
        "1MiB",
        "--verify",
    ]
    prompt_words = ["--prompt", "The list of all words is", "--max-new-tokens", "3"]
    assert main(["generate", "demo", *prompt_words, "--out", str(path), *words]) == 0
    trace = kvtrace.open(path)
    assert trace.selection == {
        "layers": [0, 2, 3],
        "heads": [1],
        "queries": "last=4",
        "max_bytes": 1 << 20,
    }
    assert trace.queries == "last=4"
    assert trace.table("verifications")["layer"].to_pylist() == [0, 2, 3]
    assert main(["generate", "demo", *prompt_words, "--queries", "few"]) == 1
    assert "all, last=N or every=N was expected" in capsys.readouterr().err


def test_log_sum_exps_from_the_device_are_those_of_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs where the tensors are on a GPU, here on the CPU."""
    calls = []

    def counted(*given: Any) -> Any:
        calls.append(held_lse(*given))
        return calls[-1]

    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, :37] = 0
    options: list[dict[str, Any]] = [{}, {"mask": mask, "heads": "1"}]
    for number, given in enumerate(options):
        host, _ = run(llama(), tmp_path / f"host{number}.kvtrace", **given)
        with monkeypatch.context() as patch:
            patch.setattr(keep, "is_off_host", lambda values: True)
            patch.setattr(copies, "is_off_host", lambda values: True)
            patch.setattr(run_rows, "is_off_host", lambda values: True)
            # No streams: see test_recorder_off_device.py.
            patch.setattr(off_device.OffDevice, "ran", lambda self, devices: None)
            # Counted, so that the writer's way cannot stand in.
            patch.setattr(copies, "held_lse", counted)
            device, _ = run(llama(), tmp_path / f"device{number}.kvtrace", **given)
        for request in range(1 + number):
            for layer in range(3):
                one, other = host.layer_data(layer, request), device.layer_data(layer, request)
                np.testing.assert_allclose(one.lse, other.lse, atol=1e-5)  # type: ignore[arg-type]
    assert len(calls) >= 2 * 3
    assert all(found is not None for found in calls)


def test_summary_keeps_norms_and_received(tmp_path: Path) -> None:
    full, _ = run(llama(), tmp_path / "full.kvtrace")
    less, _ = run(llama(), tmp_path / "summary.kvtrace", detail="summary")
    assert less.signals >= {"key_norm", "value_norm", "received"}
    assert not less.signals & {"q", "k", "v", "lse"}
    assert less.queries == "none"
    for layer in range(3):
        data = full.layer_data(layer)
        for kind, values in (("key_norm", data.k), ("value_norm", data.v)):
            norms = np.linalg.norm(np.asarray(values), axis=2)
            np.testing.assert_allclose(less.row_array(kind, layer), norms, rtol=1e-5)
        found = less.row_array("received", layer)
        np.testing.assert_allclose(found[:PROMPT], received(full, layer), atol=1e-4)


def test_a_thinned_run_replays_as_the_full_one(tmp_path: Path) -> None:
    full, _ = run(llama(), tmp_path / "full.kvtrace")
    less, _ = run(llama(), tmp_path / "less.kvtrace", queries="last=20")
    policies = ["streaming_llm", "h2o", "observed_attention", "snapkv:window=20", "tova", "knorm"]
    whens = ("prefill", "step")
    results = (
        [found for when in whens for found in replay(x, policies, ["25%", "30"], when, store=False)]
        for x in (less, full)
    )
    for found, want in zip(*results, strict=True):
        for layer, heads in want.kept().items():
            for head, positions in heads.items():
                np.testing.assert_array_equal(found.kept()[layer][head], positions)
        assert (found.hits, found.misses) == (want.hits, want.misses)
        for name in ("retained_mass", "output_error"):
            assert getattr(found, name) == pytest.approx(getattr(want, name), rel=1e-4)


@pytest.mark.writer_process
def test_max_bytes_thins_by_the_rule(tmp_path: Path) -> None:
    # A row takes 64 + 8 layers of (q 4 x 8 + lse, k and v 2 x 8) in float16: 64 + 8 * 144.
    whole = (PROMPT + NEW) * (64 + 8 * 144)
    full, one = run(llama(8), tmp_path / "full.kvtrace", max_bytes=2 * whole + 1000)
    assert not full.table("gaps").num_rows
    path = tmp_path / "less.kvtrace"
    # The prompt fits a quarter of it without values; decoded tokens then need fewer layers.
    less, other = run(llama(8), path, max_bytes=int(whole * 0.75))
    assert torch.equal(one, other)
    gaps = less.table("gaps").to_pylist()
    assert [gap["what"] for gap in gaps][:2] == ["prompt queries", "layers' v"]
    assert all("of max_bytes" in gap["reason"] for gap in gaps)
    assert "v" not in less.signals
    held = less.holdings()
    assert held.query_text == "last=64"
    kept = held.layers_with("k")
    assert kept
    found, want = (replay(x, ["h2o"], ["20"], "prefill", store=False)[0] for x in (less, full))
    assert sorted(found.kept()) == kept
    for layer in kept:
        for head, positions in found.kept()[layer].items():
            np.testing.assert_array_equal(positions, want.kept()[layer][head])


def test_a_full_trace_keeps_events_only(tmp_path: Path) -> None:
    trace, _ = run(llama(), tmp_path / "a.kvtrace", max_bytes=27_000)
    assert trace.rows < PROMPT + NEW
    assert trace.table("steps").num_rows == 1 + NEW
    reasons = trace.table("gaps")["reason"].to_pylist()
    assert any("the trace holds its max_bytes, 26.4 KiB" in reason for reason in reasons)
    assert trace.table("kv_events").num_rows
