"""A certificate is of real eviction: keys taken out of a real model's cache, a layer and head."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama.modeling_llama import rotate_half

import kvtrace
import kvtrace_recorder
from kvtrace import Trace
from kvtrace.cli import main
from kvtrace.errors import InputError
from kvtrace_recorder.certificate import certify
from kvtrace_recorder.certificate.certify import Options, _certify_request, _Work
from kvtrace_recorder.certificate.enforce import Attending, as_tensors, attention_modules
from kvtrace_viewer.replay import replay

PROMPT, NEW = 40, 16
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    # Peaked attention, so that what is evicted is missed.
    "initializer_range": 0.3,
}
ONLY = Options(passes=0, generated=0)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


def record(model: Any, path: Path, **options: Any) -> Trace:
    torch.manual_seed(5)
    ids = 3 + torch.randperm(94)[None, :PROMPT]
    length = {"max_new_tokens": NEW + 1, "min_new_tokens": NEW + 1}
    with kvtrace_recorder.record(model, path, dtype="float32"):
        model.generate(ids, **length, do_sample=False, **options)
    return kvtrace.open(path)


@pytest.fixture(scope="module")
def trace(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """A real run of a tiny model of random weights, and its replays."""
    found = record(model, tmp_path_factory.mktemp("certificate") / "run.kvtrace")
    for when in ("prefill", "step"):
        replay(found, ["full", "h2o", "knorm", "streaming_llm", "oracle"], ["30%"], when=when)
    return found


def ids_of(trace: Trace) -> torch.Tensor:
    return torch.tensor(trace.tokens()["token_id"].to_pylist())[None]


def test_nothing_evicted_is_the_model_itself(trace: Trace, model: Any) -> None:
    found = certify(trace, ["full-30pct-step"], model, options=ONLY)[0]
    assert found.rows == NEW
    assert found.kl_max < 1e-6
    assert found.agreement == 1
    assert found.diverges_at is None
    assert found.perplexity_full == pytest.approx(found.perplexity_evicted, rel=1e-6)
    assert found.key_error < 1e-5
    # In one piece, and with no attention of ours in between.
    with torch.no_grad():
        plain = model(ids_of(trace)).logits[0].double().log_softmax(1)
    following = ids_of(trace)[0, PROMPT + 1 :]
    nll = -plain[PROMPT:-1].gather(1, following[:, None])[:, 0].numpy()
    np.testing.assert_allclose(found.steps["nll_evicted"][:-1], nll, rtol=1e-5, atol=1e-6)
    assert np.isnan(found.steps["nll_full"][-1])


def evict(cache: Any, kept: list[list[list[int]]], positions: list[list[list[int]]]) -> None:
    """Take keys and values out of a cache for good; `positions` are those it holds."""
    for layer, content in enumerate(cache.layers):
        for kind in ("keys", "values"):
            heads = [
                getattr(content, kind)[0, head, [held.index(p) for p in kept[layer][head]]]
                for head, held in enumerate(positions[layer])
            ]
            setattr(content, kind, torch.stack(heads)[None])


def turned_to(model: Any, keys: torch.Tensor, kept: list[int], whole: list[int]) -> torch.Tensor:
    """Keys [key, width] that stood at their places in `whole`, at their places in `kept`."""
    moved = [place - whole.index(p) for place, p in enumerate(kept)]
    cos, sin = model.model.rotary_emb(keys, torch.tensor([moved]))
    found: torch.Tensor = keys * cos[0] + rotate_half(keys) * sin[0]
    return found


def test_layers_without_a_name_are_found_by_their_number(trace: Trace, model: Any) -> None:
    unnamed = [replace(layer, name=None) for layer in trace.layers]
    found = attention_modules(model, unnamed)
    assert {spec.layer for spec in found.values()} == {0, 1, 2}


def test_a_replay_that_ended_before_a_gap_is_run_as_far(trace: Trace, model: Any) -> None:
    request = trace.requests()[0]
    work = _Work.of(trace, {r["replay"]: r for r in trace.replays().to_pylist()}, "h2o-30pct-step")
    assert work.last == {0: request.tokens - 1}
    short = replace(work, last={0: PROMPT + 5})
    (found,) = _certify_request(trace, request, [short], model, None, ONLY, lambda share: None)
    (whole,) = certify(trace, ["h2o-30pct-step"], model, options=ONLY)
    assert found.rows == 6
    np.testing.assert_allclose(found.steps["kl"], whole.steps["kl"][:6], rtol=1e-4, atol=1e-7)


def truly_evicted(model: Any, ids: torch.Tensor, evicted_at: Any, rerotate: bool = False) -> Any:
    """Log-probabilities of the rows after the prompt, each key gone from the cache when evicted.

    Re-rotated, a row's position is the number of keys that the cache holds, and what is left of
    them is turned to its new place after every eviction.
    """
    cache: Any = DynamicCache()
    positions = [[list[int]() for _ in range(2)] for _ in range(3)]
    found = []
    with torch.no_grad():
        for start, stop in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, ids.shape[1]))]:
            first = len(positions[0][0]) if rerotate else start
            at = torch.arange(first, first + stop - start)[None]
            out = model(ids[:, start:stop], position_ids=at, past_key_values=cache)
            found.append(out.logits[0])
            kept = [
                [
                    [p for p in [*held, *range(start, stop)] if not 0 <= gone[p] < stop]
                    for gone, held in zip(of_layer.T, positions[layer], strict=True)
                ]
                for layer, of_layer in enumerate(evicted_at.transpose(1, 0, 2))
            ]
            whole = [[[*held, *range(start, stop)] for held in some] for some in positions]
            evict(cache, kept, whole)
            if rerotate:
                for content, some, rest in zip(cache.layers, whole, kept, strict=True):
                    for head, keys in enumerate(content.keys[0]):
                        content.keys[0, head] = turned_to(model, keys, rest[head], some[head])
            positions = kept
    return torch.cat(found)[PROMPT:].double().log_softmax(1)


@pytest.mark.parametrize("policy", ["streaming_llm:sinks=2", "h2o", "knorm"])
@pytest.mark.parametrize("when", ["prefill", "step"])
def test_rerotated_is_a_cache_that_turns_its_keys(
    trace: Trace, model: Any, policy: str, when: str
) -> None:
    (replayed,) = replay(trace, [policy], ["30%"], when, rerotate=True)
    want = truly_evicted(model, ids_of(trace), replayed.evicted_at, rerotate=True)
    (found,) = certify(trace, [replayed.id], model, options=Options(generated=4))
    with torch.no_grad():
        full = model(ids_of(trace)).logits[0, PROMPT:].double().log_softmax(1)
    kl = (full.exp() * (full - want)).sum(1).numpy()
    np.testing.assert_allclose(found.steps["kl"], kl, rtol=1e-3, atol=1e-6)
    plain = truly_evicted(model, ids_of(trace), replayed.evicted_at)
    assert (plain - want).abs().max() > 1e-2, "the turn must be felt, or nothing is tested"
    assert found.live is None
    assert found.generation is not None
    same = policy.startswith("streaming") or when == "prefill"
    said = "so a live run keeps the same" if same else "re-rotated"
    assert said in str(found.live_reason)


@pytest.mark.parametrize("name", ["h2o-30pct-step", "knorm-30pct-prefill", "oracle-30pct-step"])
def test_what_is_enforced_is_real_eviction(trace: Trace, model: Any, name: str) -> None:
    """Caches that really lack the keys give the same distributions."""
    evicted_at = np.asarray(trace.replay(name).array("evicted_at").read(0, trace.rows))
    want = truly_evicted(model, ids_of(trace), evicted_at)
    found = certify(trace, [name], model, options=ONLY)[0]
    with torch.no_grad():
        full = model(ids_of(trace)).logits[0, PROMPT:].double().log_softmax(1)
    kl = (full.exp() * (full - want)).sum(1).numpy()
    assert kl.mean() > 1e-3, "the eviction must be felt, or nothing is tested"
    np.testing.assert_allclose(found.steps["kl"], kl, rtol=1e-3, atol=1e-6)
    nll = -want[:-1].gather(1, ids_of(trace)[0, PROMPT + 1 :][:, None])[:, 0].numpy()
    np.testing.assert_allclose(found.steps["nll_evicted"][:-1], nll, rtol=1e-4, atol=1e-5)
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-3)
    assert found.perplexity_evicted == pytest.approx(np.exp(nll.mean()), rel=1e-4)
    same = (full.argmax(1) == want.argmax(1)).numpy()
    assert found.agreement == same.mean()
    assert found.diverges_at == (None if same.all() else PROMPT + int(np.argmin(same)))


@pytest.fixture(scope="module")
def distinct(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """As `trace`, without a token twice: equal tokens have equal norms, and ties would decide."""
    path = tmp_path_factory.mktemp("certificate") / "distinct.kvtrace"
    found = record(model, path, no_repeat_ngram_size=1)
    replay(found, ["knorm"], ["30%"], when="step")
    return found


def truly_live_knorm(model: Any, ids: torch.Tensor, percent: int) -> Any:
    """`evicted_at` of a cache that drops the largest key norm after every token, as it runs."""
    cache: Any = DynamicCache()
    gone = np.full((ids.shape[1], 3, 2), -1, np.int32)
    positions = [[list[int]() for _ in range(2)] for _ in range(3)]
    with torch.no_grad():
        for start, stop in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, ids.shape[1]))]:
            at = torch.arange(start, stop)[None]
            model(ids[:, start:stop], position_ids=at, past_key_values=cache)
            limit = max(1, stop * percent // 100)
            whole = [[[*held, *range(start, stop)] for held in some] for some in positions]
            kept = []
            for layer, some in enumerate(whole):
                kept.append([list[int]() for _ in some])
                for head, held in enumerate(some):
                    norms = cache.layers[layer].keys[0, head].norm(dim=1)
                    best = sorted(norms.argsort()[:limit].tolist())
                    kept[layer][head] = [held[i] for i in best]
                    for p in set(held) - set(kept[layer][head]):
                        gone[p, layer, head] = stop - 1
            evict(cache, kept, whole)
            positions = kept
    return gone


def test_the_live_run_is_what_a_running_cache_decides(distinct: Trace, model: Any) -> None:
    want = truly_live_knorm(model, ids_of(distinct), 30)
    found = certify(distinct, ["knorm-30pct-step"], model, options=Options(passes=30, generated=0))[
        0
    ]
    assert found.live is not None
    assert found.live.settled
    np.testing.assert_array_equal(found.live.evicted_at, want)
    replayed = np.asarray(
        distinct.replay("knorm-30pct-step").array("evicted_at").read(0, distinct.rows)
    )
    assert (replayed != want).any(), "the live run must differ, or nothing is tested"
    events = found.live.events
    at = np.unique(events["position"])
    for row in at:
        for layer in range(3):
            worst = []
            for head in range(2):
                a, b = (
                    {p for p in range(row + 1) if not 0 <= x[p, layer, head] <= row}
                    for x in (replayed, want)
                )
                worst.append(len(a & b) / len(a | b))
            here = (events["position"] == row) & (events["layer"] == layer)
            assert events["jaccard"][here] == pytest.approx(np.mean(worst))
            assert events["jaccard_worst"][here] == pytest.approx(min(worst))
    first, layer_0 = events["position"] == PROMPT - 1, events["layer"] == 0
    assert (events["jaccard"][first | layer_0] == 1).all(), "E2: exact there"
    assert found.live.jaccard < 1
    assert events["is_exact"].all()


def test_passes_that_run_out_say_so(distinct: Trace, model: Any) -> None:
    found = certify(distinct, ["knorm-30pct-step"], model, options=Options(passes=1, generated=0))[
        0
    ]
    assert found.live is not None
    assert not found.live.settled
    exact = found.live.events["is_exact"]
    assert exact[found.live.events["position"] == PROMPT - 1].all()
    assert not exact.all()
    want = truly_live_knorm(model, ids_of(distinct), 30)
    settled = int(found.live.events["position"][exact].max())
    for x in (want, found.live.evicted_at):
        x[(x > settled)] = -1
    np.testing.assert_array_equal(found.live.evicted_at, want)


def test_what_is_stored_and_shown(
    trace: Trace, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocab = {f"w{i}": i for i in range(97)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="w0"))  # noqa: S106
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    name = "h2o-30pct-step"
    args = ["verify", str(trace.path), "--replay", name, "--model", str(tmp_path)]
    assert main([*args, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said) == 1
    assert said[0]["predicted"]["retained_mass"] < 1
    assert said[0]["generation"]["tokens"] == NEW
    joined = "select c.*, r.policy from certificates c join replays r using (replay)"
    stored = trace.sql(f"{joined} where replay = '{name}'").to_pylist()[0]
    assert stored["policy"] == "h2o"
    for column in ("kl_mean", "kl_p95", "agreement", "perplexity_evicted", "diverges_at", "rows"):
        assert stored[column] == said[0][column]
    assert stored["live_jaccard"] == said[0]["live"]["jaccard"]
    assert stored["generated_full"] == said[0]["generation"]["full"]
    steps = trace.sql(f"select * from certificate_steps where replay = '{name}' order by position")
    assert steps["position"].to_pylist() == list(range(PROMPT, PROMPT + NEW))
    assert np.mean(steps["kl"].to_numpy()) == pytest.approx(said[0]["kl_mean"])
    assert trace.sql("select count(*) n from certificate_events")["n"][0].as_py() > 0
    assert main(args) == 0
    assert "top-1 agreement" in capsys.readouterr().out
    assert main(["info", str(trace.path)]) == 0
    assert f"certificate {name}" in capsys.readouterr().out
    replay(trace, ["h2o"], ["30%"], when="step")
    assert not trace.sql(f"from certificates where replay = '{name}'").num_rows, (
        "a new result has no old certificate"
    )


def test_generation_with_everything_kept_is_the_recorded_text(trace: Trace, model: Any) -> None:
    options = Options(passes=0, generated=64)
    full, h2o = certify(trace, ["full-30pct-step", "h2o-30pct-step"], model, options=options)
    for one in (full, h2o):
        assert one.generation is not None
        assert one.generation.tokens == NEW
    assert full.generation is not None
    assert full.generation.diverges_at is None
    # The recorded run was greedy: free running parts where the teacher-forced run first differs.
    assert h2o.generation is not None
    apart = h2o.generation.diverges_at
    first = PROMPT - 1 + (NEW if apart is None else apart)
    assert h2o.diverges_at == (first if apart is not None else h2o.diverges_at)


def test_sliding_layers_and_batches(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=24, pad_token_id=0)).eval()
    ids = torch.randint(3, 97, (2, PROMPT))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with kvtrace_recorder.record(model, tmp_path / "run.kvtrace", dtype="float32"):
        model.generate(ids, attention_mask=mask, max_new_tokens=9, min_new_tokens=9)
    trace = kvtrace.open(tmp_path / "run.kvtrace")
    replay(trace, ["full", "h2o"], ["40%"], when="step")
    found = certify(trace, ["full-40pct-step", "h2o-40pct-step"], model, options=Options(9, 0))
    assert [(one.replay, one.request) for one in found] == [
        (name, request) for name in ("full-40pct-step", "h2o-40pct-step") for request in (0, 1)
    ]
    assert all(one.kl_max < 1e-6 for one in found[:2]), "the model's own window evicts nothing more"
    assert all(one.kl_mean > 1e-4 for one in found[2:])
    assert all(one.key_error < 1e-4 for one in found), "padding moves no token"
    assert all(one.live is not None and one.live.settled for one in found[2:])
    assert set(trace.sql("select request from certificates")["request"].to_pylist()) == {0, 1}


def test_another_model_is_refused(trace: Trace) -> None:
    torch.manual_seed(9)
    other = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    with pytest.raises(InputError, match="off the recorded"):
        certify(trace, ["h2o-30pct-step"], other, options=ONLY)
    smaller = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": 2})).eval()
    with pytest.raises(InputError, match="layer 2"):
        certify(trace, ["h2o-30pct-step"], smaller, options=ONLY)


def test_the_hook_leaves_nothing_behind(trace: Trace, model: Any) -> None:
    before = AttentionInterface.__dict__.get("get_interface")
    layers = attention_modules(model, trace.layers)
    with pytest.raises(RuntimeError, match="within"), Attending(layers):
        raise RuntimeError("within")
    assert AttentionInterface.__dict__.get("get_interface") is before
    hidden = as_tensors(np.full((4, 3, 2), -1, np.int32), model)
    assert int(hidden[0].min()) == 2**31 - 1


def test_the_verb_says_what_is_missing(
    trace: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(trace.path), "--replay", "nothing"]) == 1
    assert "'nothing' was not found" in capsys.readouterr().err
    assert main(["verify", str(trace.path), "--replay", "h2o-30pct-step"]) == 1
    assert "--model DIR" in capsys.readouterr().err
    assert main(["verify", str(trace.path)]) == 2


def test_cuts_inside_the_prompt_are_run_live_where_their_places_are_known(
    trace: Trace, model: Any
) -> None:
    (every,) = replay(trace, ["h2o"], ["30%"], "chunk=16")
    (recorded,) = replay(trace, ["h2o"], ["30%"], "chunk")
    found, other = certify(trace, [every.id, recorded.id], model, options=Options(generated=0))
    assert found.rows == PROMPT + NEW - 16
    assert found.live is not None
    assert found.live.settled
    assert sorted(set(found.live.events["position"])) == [15, 31, PROMPT - 1]
    first = found.live.events["position"] == 15
    assert (found.live.events["jaccard"][first] == 1).all(), "the first cut sees the full cache"
    assert other.live is None
    assert "replay chunk=N" in str(other.live_reason)
