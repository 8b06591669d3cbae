"""Tiny random models of many families: same outputs, whole rows, the model's own attention."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn.attention.flex_attention import create_block_mask
from transformers.models.llama import modeling_llama

import kvtrace
from kvtrace_recorder import record

PROMPT, NEW = 21, 9
_COMMON = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GQA = {**_COMMON, "num_key_value_heads": 2}

#: Name of the causal-LM class: its configuration. A window of 8 is shorter than the prompt.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": _GQA,
    "Qwen2": _GQA,
    "Qwen3": {**_GQA, "head_dim": 16},
    "Mistral": {**_GQA, "sliding_window": 8},
    "Gemma2": {**_GQA, "head_dim": 16, "sliding_window": 8, "attn_logit_softcapping": 5.0},
    "Gemma3": {
        **_GQA,
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "GPT2": {
        "vocab_size": 96,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "eos_token_id": None,
        "pad_token_id": 0,
    },
    "GPTNeoX": _COMMON,
    "Phi": _GQA,
    "Phi3": {**_GQA, "sliding_window": None},
    "Olmo": _GQA,
    "Mixtral": {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "GptOss": {
        **_GQA,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
#: Multi-head latent attention: values are narrower than keys, and the cache holds neither.
_MLA = {
    **_COMMON,
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
FAMILIES |= {
    "DeepseekV2": {**_MLA, "q_lora_rank": None, "topk_method": "greedy"},
    "DeepseekV3": {**_MLA, "q_lora_rank": 16},
}
#: Families that compute attention themselves, in their own words.
_OWN = {"vocab_size": 96, "n_layer": 2, "n_head": 4, "eos_token_id": None, "pad_token_id": 0}
_FALCON = {**_COMMON, "alibi": False, "new_decoder_architecture": False}
FAMILIES |= {
    "GPTJ": {**_OWN, "n_embd": 48, "n_positions": 128, "rotary_dim": 8, "bos_token_id": 1},
    "CodeGen": {**_OWN, "n_embd": 48, "n_positions": 128, "n_ctx": 128, "rotary_dim": 8},
    "GPTNeo": {
        **_COMMON,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "Bloom": {**_OWN, "hidden_size": 48},
    "Bloom of six heads": {**_OWN, "hidden_size": 48, "n_head": 6},
    "Mpt": {
        **_OWN,
        "d_model": 48,
        "n_layers": 2,
        "n_heads": 4,
        "max_seq_len": 128,
        "use_cache": True,
    },
    "Falcon": {**_FALCON, "multi_query": True},
    "Falcon of two KV heads": {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "XGLM": {
        **_OWN,
        "d_model": 48,
        "ffn_dim": 64,
        "num_layers": 2,
        "attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
    },
}
#: Kernels that transformers does not offer to a family.
EAGER_ONLY = {"Gemma2", "GptOss", "GPTJ", "CodeGen", "GPTNeo", "Mpt", "XGLM"} | {
    name for name in FAMILIES if name.startswith("Bloom")
}
CASES = [
    (family, kernel)
    for family in FAMILIES
    for kernel in ("eager", "sdpa")
    if not (kernel == "sdpa" and family in EAGER_ONLY)
]
CASES += [
    (family, "flex_attention")
    for family in ("Llama", "Qwen3", "Mistral", "Gemma2", "Gemma3", "GPTNeoX", "DeepseekV3")
]
_CLASSES = {
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "GPT2": ("GPT2Config", "GPT2LMHeadModel"),
}


pytestmark = pytest.mark.usefixtures("one_thread", "writer_thread")


@pytest.fixture(autouse=True)
def _flex_without_its_compiler() -> Iterator[None]:
    # Compiling flex attention takes a minute; uncompiled it is the same function.
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        # transformers' own call of torch.
        warnings.filterwarnings("ignore", "_compile flag on create_block_mask")
        yield


def build(family: str, kernel: str) -> Any:
    name = family.split()[0]
    config_name, model_name = _CLASSES.get(name, (f"{name}Config", f"{name}ForCausalLM"))
    config = getattr(transformers, config_name)(**FAMILIES[family])
    torch.manual_seed(7)
    model = getattr(transformers, model_name)._from_config(config, attn_implementation=kernel)
    # Small default weights make attention almost uniform; a wrong mask or scale would hide in it.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name and ".wte" not in name:
                weight.mul_(6)
    return model.eval()


def prompt() -> torch.Tensor:
    return torch.randint(3, 96, (1, PROMPT), generator=torch.Generator().manual_seed(3))


def greedy(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    options = {"attention_mask": torch.ones_like(ids), **options}
    return model.generate(
        ids,
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


def own_attention(model: Any, ids: torch.Tensor) -> list[np.ndarray[Any, Any]]:
    """[q_head, row, key] of each layer by an eager run of the same weights."""
    model.set_attn_implementation("eager")
    # Falcon reads this and nothing else.
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        return [a[0].numpy() for a in model(ids, output_attentions=True).attentions]


@pytest.mark.parametrize(("family", "kernel"), CASES)
def test_outputs_are_bit_identical_and_attention_is_the_models_own(
    family: str, kernel: str, tmp_path: Path
) -> None:
    model = build(family, kernel)
    ids = prompt()
    plain = greedy(model, ids)
    with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording:
        recorded = greedy(model, ids)
    again = greedy(model, ids)

    for other in (recorded, again):
        assert torch.equal(plain.sequences, other.sequences)
        assert all(torch.equal(a, b) for a, b in zip(plain.logits, other.logits, strict=True))
    assert recording.gaps == {}
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert trace.status == "complete"
    assert trace.rows == recording.rows == PROMPT + NEW - 1
    assert trace.signals >= {"q", "k", "v", "lse"}
    assert [r.tokens for r in trace.requests()] == [PROMPT + NEW - 1]
    ids_recorded = trace.tokens(0)["token_id"].to_pylist()
    assert ids_recorded == plain.sequences[0, :-1].tolist()
    own = own_attention(model, plain.sequences[:, :-1])
    for layer, expected in enumerate(own):
        for head in range(len(expected)):
            np.testing.assert_allclose(trace.attention(layer, head), expected[head], atol=1e-5)


@pytest.mark.writer_process
def test_alibi_is_written_as_the_model_applies_it(tmp_path: Path) -> None:
    slopes = {}
    for kernel in ("eager", "sdpa"):
        FAMILIES["Falcon with ALiBi"] = {**_FALCON, "multi_query": False, "alibi": True}
        model = build("Falcon with ALiBi", kernel)
        with record(model, tmp_path / kernel, dtype="float32", strict=True) as recording:
            sequences = greedy(model, prompt()).sequences[:, :-1]
        assert recording.gaps == {}
        trace = kvtrace.open(tmp_path / kernel)
        slopes[kernel] = np.array(trace.layers[1].alibi_slopes)
        for layer, expected in enumerate(heard(model, sequences)):
            data = trace.layer_data(layer)
            assert data.v is not None
            for head in range(4):
                found = trace.attention(layer, head) @ data.v[:, head]
                np.testing.assert_allclose(found, expected[:, head], atol=1e-5)
    # Falcon's paper has 2 ** (-2, -4, -6, -8), over the root of the head's width; transformers'
    # eager code adds them to the scores and, with the mask, once more.
    expected_slopes = 2.0 ** -np.arange(2, 9, 2) / 12**0.5
    np.testing.assert_allclose(slopes["sdpa"], expected_slopes, rtol=1e-5)
    np.testing.assert_allclose(slopes["eager"], 2 * expected_slopes, rtol=1e-5)


def heard(model: Any, ids: torch.Tensor) -> list[np.ndarray[Any, Any]]:
    """[row, q_head, value_dim] of each layer of a Falcon: what attention gave to `dense`."""
    found = []
    handles = [
        block.self_attention.dense.register_forward_pre_hook(
            lambda _, given: found.append(given[0][0].numpy().reshape(len(given[0][0]), 4, -1))
        )
        for block in model.transformer.h
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(("family", "rows"), [("Bloom", 1), ("GPTJ", 5)])
def test_a_prompt_of_one_token_shows_no_bias(family: str, rows: int, tmp_path: Path) -> None:
    model = build(family, "eager")
    with record(model, tmp_path / "a.kvtrace", strict=True, dtype="float32") as recording:
        model.generate(prompt()[:, :1], max_new_tokens=5, do_sample=False)
    # From the second token on the bias is seen, and the layer is not what it seemed.
    assert recording.rows == rows
    assert any("adds another bias" in reason for reason in recording.gaps) == (family == "Bloom")


def test_a_bias_that_is_no_alibi_is_a_gap(tmp_path: Path) -> None:
    model = build("Bloom", "eager").to(torch.bfloat16)
    ids = torch.randint(3, 96, (1, 700), generator=torch.Generator().manual_seed(3))
    with record(model, tmp_path / "a.kvtrace", strict=True) as recording, torch.no_grad():
        model(ids)
    # Beyond 256 tokens bfloat16 cannot count, and its ALiBi is stairs rather than a line.
    assert "more than a scaled q k^T and ALiBi" in next(iter(recording.gaps))
    assert recording.rows == 0


@pytest.mark.parametrize("family", ["Llama", "Gemma3", "GPT2"])
def test_float16_traces_agree_to_two_thousandths(family: str, tmp_path: Path) -> None:
    model = build(family, "eager")
    with record(model, tmp_path / "a.kvtrace", strict=True):
        sequences = greedy(model, prompt()).sequences
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    for layer, expected in enumerate(own_attention(model, sequences[:, :-1])):
        for head in range(len(expected)):
            found = trace.attention(layer, head)
            np.testing.assert_allclose(found, expected[head], atol=2e-3)
            np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)


@pytest.mark.writer_process
def test_a_bfloat16_model_is_stored_exactly_in_float16(tmp_path: Path) -> None:
    model = build("Llama", "sdpa").to(torch.bfloat16)
    plain = greedy(model, prompt()).sequences
    for dtype in ("float16", "float32"):
        with record(model, tmp_path / dtype, dtype=dtype, strict=True) as recording:
            assert torch.equal(greedy(model, prompt()).sequences, plain)
        assert recording.gaps == {}
    narrow, wide = (kvtrace.open(tmp_path / dtype) for dtype in ("float16", "float32"))
    assert narrow.table("models")["dtype"].to_pylist() == ["bfloat16"]
    for layer in range(2):
        for kind in ("q", "k", "v"):
            found, expected = (getattr(t.layer_data(layer), kind) for t in (narrow, wide))
            # Below 2**-14 float16 has fewer digits.
            np.testing.assert_allclose(found, expected, rtol=0, atol=2.0**-25)


_PADDED = {"Llama", "Mistral", "GPT2", "Falcon", "Bloom", "Mpt", "DeepseekV3"}


@pytest.mark.writer_process
@pytest.mark.parametrize(("family", "kernel"), [case for case in CASES if case[0] in _PADDED])
def test_left_padding_is_not_recorded(family: str, kernel: str, tmp_path: Path) -> None:
    model = build(family, kernel)
    full = prompt()
    short = full[:, 9:]
    batch = torch.cat([full, torch.cat([torch.zeros(1, 9, dtype=torch.long), short], 1)])
    mask = (torch.arange(PROMPT) >= torch.tensor([[0], [9]])).long()
    with record(model, tmp_path / "batch.kvtrace", dtype="float32", strict=True) as recording:
        together = greedy(model, batch, attention_mask=mask).sequences
    assert recording.gaps == {}
    trace = kvtrace.open(tmp_path / "batch.kvtrace")
    assert [r.prompt_tokens for r in trace.requests()] == [PROMPT, PROMPT - 9]
    assert trace.tokens(1)["token_id"].to_pylist() == together[1, 9:-1].tolist()
    for request, sequence in enumerate([together[:1, :-1], together[1:, 9:-1]]):
        for layer, expected in enumerate(own_attention(model, sequence)):
            for head in range(len(expected)):
                found = trace.attention(layer, head, request=request)
                np.testing.assert_allclose(found, expected[head], atol=1e-4)


def test_a_flex_mask_that_says_something_else_is_a_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prefix(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) | (key < 4)

    mask = create_block_mask(prefix, B=1, H=1, Q_LEN=PROMPT, KV_LEN=PROMPT, device="cpu")
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda **_: mask)
    model = build("Llama", "flex_attention")
    with torch.no_grad(), record(model, tmp_path / "a.kvtrace", strict=True) as recording:
        model(prompt())
    assert recording.rows == 0
    assert "the mask of layer 0 is not that of full attention" in next(iter(recording.gaps))


def test_the_latent_cache_of_mla_is_counted_as_it_is_held(tmp_path: Path) -> None:
    model = build("DeepseekV3", "sdpa")
    with torch.no_grad(), record(model, tmp_path / "a.kvtrace", strict=True):
        model(prompt())
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert {(x.num_kv_heads, x.head_dim, x.value_dim) for x in trace.layers} == {(4, 12, 10)}
    events = trace.table("kv_events").to_pylist()
    # A latent of 20 and a rotary key of 4 numbers a token, for all heads together.
    assert {(e["tokens"], e["bytes"]) for e in events if e["event"] == "grow"} == {
        (PROMPT, PROMPT * 24 * 4)
    }


def test_right_padding_and_a_model_without_cache(tmp_path: Path) -> None:
    model = build("Llama", "sdpa")
    full = prompt()
    batch = torch.cat([full, full])
    batch[1, 12:] = 0
    mask = torch.ones_like(batch)
    mask[1, 12:] = 0
    with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True), torch.no_grad():
        model(batch, attention_mask=mask, use_cache=False)
        model(full[:, :5], use_cache=False)
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert [r.tokens for r in trace.requests()] == [PROMPT, 12, 5]
    assert trace.table("kv_events").num_rows == 0
    for layer, expected in enumerate(own_attention(model, full[:, :12])):
        found = trace.attention(layer, 1, request=1)
        np.testing.assert_allclose(found, expected[1], atol=1e-5)


@pytest.mark.writer_process
def test_a_loop_by_hand_continues_its_requests(tmp_path: Path) -> None:
    model = build("Qwen2", "sdpa")
    ids = prompt()
    with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True), torch.no_grad():
        first = model(ids[:, :10])
        second = model(ids[:, 10:17], past_key_values=first.past_key_values)
        model(ids[:, 17:18], past_key_values=second.past_key_values)
        model(ids[:, :3])
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert [r.tokens for r in trace.requests()] == [18, 3]
    assert trace.table("steps")["phase"].to_pylist() == ["prefill", "prefill", "decode", "prefill"]
    for layer, expected in enumerate(own_attention(model, ids[:, :18])):
        np.testing.assert_allclose(trace.attention(layer, 2), expected[2], atol=1e-5)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_a_static_cache_is_recorded(kernel: str, tmp_path: Path) -> None:
    model = build("Llama", kernel)
    full = prompt()
    batch = torch.cat([full, full])
    batch[1, :4] = 0
    mask = torch.ones_like(batch)
    mask[1, :4] = 0
    with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording:
        out = greedy(model, batch, attention_mask=mask, cache_implementation="static").sequences
    assert recording.gaps == {}
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert [r.tokens for r in trace.requests()] == [PROMPT + NEW - 1, PROMPT + NEW - 5]
    for layer, expected in enumerate(own_attention(model, out[1:, 4:-1])):
        np.testing.assert_allclose(trace.attention(layer, 3, request=1), expected[3], atol=1e-4)


def test_cache_growth_is_recorded_by_layer_and_step(tmp_path: Path) -> None:
    model = build("Llama", "sdpa")
    with record(model, tmp_path / "a.kvtrace", strict=True):
        greedy(model, prompt())
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    found = trace.sql(
        "select step, layer, tokens, bytes from kv_events where event = 'grow' order by step, layer"
    ).to_pylist()
    assert len(found) == 2 * NEW
    # Two sides, two heads of 12 float32 numbers.
    assert found[0] == {"step": 0, "layer": 0, "tokens": PROMPT, "bytes": PROMPT * 2 * 2 * 12 * 4}
    assert found[-1]["tokens"] == PROMPT + NEW - 1
    assert trace.sql("select count(*) n from kv_events where event = 'free'").to_pylist() == [
        {"n": 1}
    ]
