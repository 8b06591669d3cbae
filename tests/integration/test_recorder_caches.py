"""Caches whose slots move: crops, beams, copies; and every kind of cache of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.cache_utils import DynamicCache, QuantizedCache, StaticCache

import kvtrace
from kvtrace_recorder import record

VOCABULARY = 40
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


pytestmark = pytest.mark.usefixtures("one_thread", "writer_thread")


def build(family: str, kernel: str = "sdpa", layers: int = 2, seed: int = 7) -> Any:
    """A tiny model of random weights."""
    torch.manual_seed(seed)
    common = {**_COMMON, "num_hidden_layers": layers}
    model: Any
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=VOCABULARY, n_embd=48, n_layer=layers, n_head=4, n_positions=256
        )
        config.eos_token_id, config.pad_token_id = None, 0
        model = GPT2LMHeadModel._from_config(config, attn_implementation=kernel)
    elif family == "mistral":
        sliding = MistralConfig(**common, sliding_window=8)
        model = MistralForCausalLM._from_config(sliding, attn_implementation=kernel)
    elif family == "gemma3":
        kinds = ["sliding_attention", "full_attention"][:layers]
        hybrid = Gemma3TextConfig(**common, head_dim=16, sliding_window=8, layer_types=kinds)
        model = Gemma3ForCausalLM._from_config(hybrid, attn_implementation=kernel)
    else:
        llama = LlamaConfig(**common)
        model = LlamaForCausalLM._from_config(llama, attn_implementation=kernel)
    # Small default weights make attention almost uniform; a wrong row would hide in it.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight.mul_(6)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def prompts(batch: int = 1, length: int = 14) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def generate(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    given = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    return model.generate(
        ids, return_dict_in_generate=True, output_logits=True, **{**given, **options}
    )


def own_attention(model: Any, ids: list[int]) -> list[np.ndarray[Any, Any]]:
    """[q_head, row, key] of each layer by an eager run of the same weights on one sequence."""
    kernel = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(torch.tensor([ids]), output_attentions=True).attentions
    model.set_attn_implementation(kernel)
    return [a[0].numpy() for a in found]


def check_attention(
    trace: kvtrace.Trace, model: Any, request: int, atol: float = 1e-5
) -> list[int]:
    """Assert that a request's maps are the model's own on its tokens; those."""
    ids: list[int] = trace.tokens(request)["token_id"].to_pylist()
    for layer, expected in enumerate(own_attention(model, ids)):
        for head in range(len(expected)):
            found = trace.attention(layer, head, request=request)
            np.testing.assert_allclose(found, expected[head], atol=atol)
    return ids


def recorded(path: Path, model: Any, run: Any) -> tuple[Any, kvtrace.Trace]:
    """Run without and with a recorder, assert the same bits, and open the trace."""
    plain = run()
    with record(model, path, dtype="float32", strict=True) as recording:
        found = run()
    assert recording.gaps == {}
    assert torch.equal(plain.sequences, found.sequences)
    for one, other in zip(plain.logits, found.logits, strict=True):
        assert torch.equal(one, other)
    return found, kvtrace.open(path)


def events(trace: kvtrace.Trace, event: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = trace.sql(
        f"select * from kv_events where event = '{event}' order by ts_ns, layer"
    ).to_pylist()
    return found


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_prompt_lookup_crops_what_was_rejected(family: str, tmp_path: Path) -> None:
    model = build(family)
    # Repetitions to look up; a random model rejects most of what is found.
    ids = prompts(length=8).repeat(1, 3)
    found, trace = recorded(
        tmp_path / "a.kvtrace", model, lambda: generate(model, ids, prompt_lookup_num_tokens=3)
    )
    (request,) = trace.requests()
    assert request.prompt_tokens == 24
    tokens = check_attention(trace, model, 0)
    assert tokens == found.sequences[0, :-1].tolist()
    # More rows than tokens: the rejected ones are there too.
    assert trace.rows > len(tokens)
    forks = trace.table("forks").to_pylist()
    assert forks
    assert all((f["request"], f["source"]) == (0, 0) for f in forks)
    crops = events(trace, "crop")
    assert {e["layer"] for e in crops} == {0, 1}
    sources = trace.tokens(0)["source"].to_pylist()
    assert sources == ["prompt"] * 24 + ["generated"] * (len(tokens) - 24)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_assisted_decoding_is_two_models_in_one_trace(family: str, tmp_path: Path) -> None:
    model, assistant = build(family), build(family, layers=1, seed=8)
    # Mostly the same weights, so that some guesses are accepted.
    assistant.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    assistant.lm_head.load_state_dict(model.lm_head.state_dict())
    ids = prompts()
    found, trace = recorded(
        tmp_path / "a.kvtrace", None, lambda: generate(model, ids, assistant_model=assistant)
    )
    by_model = {r.model: r.request for r in trace.requests() if r.tokens > 20}
    models = trace.table("models").to_pylist()
    deep = next(m["model"] for m in models if m["num_layers"] == 2)
    assert check_attention(trace, model, by_model[deep]) == found.sequences[0, :-1].tolist()
    check_attention(trace, assistant, by_model[1 - deep])


@pytest.mark.writer_process
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("padded", [False, True])
def test_beams_are_followed(family: str, padded: bool, tmp_path: Path) -> None:
    model = build(family)
    ids = prompts(batch=2)
    mask = torch.ones_like(ids)
    if padded:
        ids[1, :5] = 0
        mask[1, :5] = 0
    found, trace = recorded(
        tmp_path / "a.kvtrace",
        model,
        lambda: generate(model, ids, num_beams=4, attention_mask=mask),
    )
    requests = trace.requests()
    assert len(requests) == 8
    assert [r.prompt_tokens for r in requests] == [14] * 4 + [9 if padded else 14] * 4
    ends = [check_attention(trace, model, r.request, 1e-4 if padded else 1e-5) for r in requests]
    for prompt, skipped in ((0, 0), (1, 5 if padded else 0)):
        best = found.sequences[prompt, skipped:-1].tolist()
        assert best in ends[4 * prompt : 4 * prompt + 4]
    forks = trace.table("forks").to_pylist()
    assert forks
    assert all(f["request"] // 4 == f["source"] // 4 for f in forks)
    # After every step of prompt and 11 decoded tokens, in both layers.
    assert len(events(trace, "reorder")) == 2 * 12


def test_rows_of_a_batch_are_copied_picked_and_moved(tmp_path: Path) -> None:
    model = build("llama")
    ids = prompts(batch=2, length=6)

    def step(cache: Any, tokens: list[int]) -> Any:
        return model(torch.tensor(tokens)[:, None], past_key_values=cache).past_key_values

    with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True), torch.no_grad():
        cache = model(ids).past_key_values
        cache.batch_repeat_interleave(2)
        cache = step(cache, [11, 12, 13, 14])
        cache.crop(-2)
        cache.reorder_cache(torch.tensor([3, 1, 0, 2]))
        cache.crop(-1)
        cache = step(cache, [15, 16, 17, 18])
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache = step(cache, [19, 20])
        cache.batch_select_indices(torch.tensor([True, False]))
        cache = step(cache, [21])
        cache.crop(-3)
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    a, b = (ids[n, :4].tolist() for n in (0, 1))
    # Requests 0 and 1 took their first copies along; 2 and 3 are the second ones.
    want = {0: [*b, 15, 20], 2: [*a, 16], 1: a, 3: [*b, 18]}
    assert trace.table("gaps").num_rows == 0
    found = {r.request: check_attention(trace, model, r.request) for r in trace.requests()}
    assert found == want
    ended = trace.sql("select request from kv_events where event = 'free' order by 1").to_pylist()
    # The cache of the last one is still there.
    assert [e["request"] for e in ended] == [0, 2, 3]


def test_a_change_that_cannot_be_followed_is_a_gap(tmp_path: Path) -> None:
    model = build("llama")
    with record(model, tmp_path / "a.kvtrace", strict=True) as recording, torch.no_grad():
        cache = model(prompts(length=6)).past_key_values
        for layer in cache.layers:
            layer.crop(-2)
        model(prompts(length=1), past_key_values=cache)
    assert list(recording.gaps) == ["the cache held 6 tokens and now 4"]
    assert kvtrace.open(tmp_path / "a.kvtrace").requests()[0].tokens == 6


@pytest.mark.writer_process
def test_a_request_goes_on_after_a_crop_by_hand(tmp_path: Path) -> None:
    model = build("gpt2")
    ids = prompts(length=10)
    with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True), torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        cache.crop(-4)
        model(ids[:, :3], past_key_values=cache)
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert check_attention(trace, model, 0) == ids[0, :6].tolist() + ids[0, :3].tolist()
    crop = events(trace, "crop")[0]
    # A view of ten tokens' memory remains until the next step copies it.
    assert (crop["tokens"], crop["bytes"]) == (6, 2 * 10 * 48 * 4)
    assert crop["step"] is None


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_dynamic_static_and_sliding_caches(
    cache: str, family: str, kernel: str, tmp_path: Path
) -> None:
    model = build(family, kernel)
    ids = prompts(batch=2)
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0

    def run() -> Any:
        return generate(model, ids, attention_mask=mask, cache_implementation=cache)

    found, trace = recorded(tmp_path / "a.kvtrace", model, run)
    assert check_attention(trace, model, 0) == found.sequences[0, :-1].tolist()
    assert check_attention(trace, model, 1, 1e-4) == found.sequences[1, 3:-1].tolist()
    sized = trace.sql("select * from kv_events where event <> 'free' order by ts_ns").to_pylist()
    held = {e["layer"]: (e["tokens"], e["bytes"]) for e in sized}
    slots = 25
    window = {"dynamic": 7, "static": 8}[cache]
    want = {"llama": [slots, slots], "mistral": [window, window], "gemma3": [window, slots]}[family]
    width = model.config.head_dim * model.config.num_key_value_heads
    assert [tokens for tokens, _ in held.values()] == want
    # Keys and values of two rows; what slides is a view of a tensor with one token more.
    memory = [tokens + (tokens == 7) for tokens in want]
    assert [n for _, n in held.values()] == [2 * 2 * tokens * width * 4 for tokens in memory]


@pytest.mark.parametrize("length", [3, 8, 30])
def test_a_static_window_is_followed_while_it_fills_and_when_it_slides(
    length: int, tmp_path: Path
) -> None:
    model = build("mistral", "eager")
    ids = prompts(length=30)
    cache = StaticCache(config=model.config, max_cache_len=64)
    with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True), torch.no_grad():
        # Filling, becoming full, full with one new token and with many.
        for part in (ids[:, :length], ids[:, :3], ids[:, :3], ids[:, :1], ids[:, :1], ids[:, :12]):
            model(part, past_key_values=cache)
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert trace.table("gaps").num_rows == 0
    assert len(check_attention(trace, model, 0)) == length + 20


@pytest.mark.parametrize("options", [{"backend": "fp8"}, {"backend": "quanto", "nbits": 4}])
def test_a_quantised_cache_says_what_its_rows_are(options: dict[str, Any], tmp_path: Path) -> None:
    model = build("llama", "eager")
    ids = prompts()
    if options["backend"] == "quanto":
        options = {**options, "q_group_size": 12, "residual_length": 4}

    def run() -> Any:
        cache = QuantizedCache(config=model.config, **options)
        return generate(model, ids, past_key_values=cache, output_attentions=True)

    plain = run()
    with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording:
        found = run()
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, found.logits, strict=True))
    ((reason, count),) = recording.gaps.items()
    name = {"fp8": "Fp8QuantizedLayer", "quanto": "QuantoQuantizedLayer"}[options["backend"]]
    assert f"read earlier ones back from a {name}, rounded" in reason
    assert count == 11
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert trace.tokens(0)["token_id"].to_pylist() == found.sequences[0, :-1].tolist()
    for layer in range(2):
        # The prompt attended to itself before anything was packed.
        prompt = found.attentions[0][layer][0].numpy()
        own = np.stack([trace.attention(layer, head)[:14, :14] for head in range(4)])
        np.testing.assert_allclose(own, prompt, atol=1e-5)
        last = found.attentions[-1][layer][0, :, 0].numpy()
        later = np.stack([trace.attention(layer, head)[24] for head in range(4)])
        assert 1e-5 < abs(later - last).max() < 0.2
    # An eighth of float32 and scales, or a quarter; and what is not packed yet.
    grown = events(trace, "grow")
    assert [e["tokens"] for e in grown if e["layer"] == 0] == list(range(14, 26))
    unpacked = 25 * 2 * 2 * 12 * 4
    assert unpacked / 8 < grown[-1]["bytes"] < unpacked / 2


def test_a_layer_that_comes_back_from_another_device_is_an_event(tmp_path: Path) -> None:
    model = build("llama")
    with record(model, tmp_path / "a.kvtrace", strict=True), torch.no_grad():
        cache = model(prompts()).past_key_values
        # Without a GPU no more of offloading runs than its copies.
        cache.layers[1].device = torch.device("meta")
        cache.layers[1].prefetch()
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    (event,) = events(trace, "restore")
    assert (event["layer"], event["tokens"], event["device"]) == (1, 14, "meta")


def test_a_static_cache_that_is_reset_in_place_keeps_what_it_showed(tmp_path: Path) -> None:
    model = build("llama")
    cache = StaticCache(config=model.config, max_cache_len=64)
    with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True), torch.no_grad():
        for length in (9, 5):
            ids = prompts(length=length)
            model(ids, past_key_values=cache, cache_position=torch.arange(length))
            for step in range(3):
                at = torch.tensor([length + step])
                model(ids[:, :1] + step, past_key_values=cache, cache_position=at)
            cache.reset()
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert [len(check_attention(trace, model, r.request)) for r in trace.requests()] == [12, 8]
