"""Every causal-LM class of transformers that a generic tiny configuration can build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import kvtrace
from kvtrace_recorder import record

TOKENS = 13
#: Set where a configuration has a field of that name.
SMALL: dict[str, Any] = (
    dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "embedding_size"), 48)
    | dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "decoder_ffn_dim", "n_inner"), 64)
    | dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2)
    | dict.fromkeys(("decoder_layers", "encoder_layers", "num_key_value_heads", "num_kv_heads"), 2)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4)
    | dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4)
    | dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128)
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4)
    | dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32)
    | dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "bos_token_id"), 1)
    | {"vocab_size": 96, "vocab_size_per_layer_input": 96, "num_experts_per_tok": 2}
    | {"head_dim": 12, "rotary_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 20, "v_head_dim": 10}
    | {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "mamba_d_state": 8, "mamba_expand": 2}
    | {"pad_token_id": 0, "eos_token_id": 2, "sliding_window": 8, "is_decoder": True}
)
#: What their scores hold has no column in a trace, or they do not attend: gaps, never wrong rows.
UNRECORDED = {
    "bigbird_pegasus": "is not that of bidirectional attention",
    "diffllama": "attended twice in one step",
    "doge": "adds a bias to the scores",
    "falcon_mamba": "no attention call passed the tap",
    "hrm_text": "attended twice in one step",
    "inkling2_text": "adds a position bias",
    "inkling_text": "adds a position bias",
    "mamba": "no attention call passed the tap",
    "prophetnet": "no attention call passed the tap",
    "rwkv": "no attention call passed the tap",
    "xlnet": "no attention call passed the tap",
}
#: Their code leaves the share of a learned sink out of the weights that it returns.
WITHOUT_SINKS = {"granite_swa", "granitemoe_swa"}


pytestmark = pytest.mark.usefixtures("one_thread", "writer_thread")


def build(name: str) -> Any:
    """A tiny random-weight model; skips where the generic configuration fits the family badly."""
    try:
        default = CONFIG_MAPPING[name]().get_text_config()
        fields = {k: v for k, v in default.to_dict().items() if v is not None}
        chosen = {k: v for k, v in SMALL.items() if k in fields}
        if kinds := fields.get("layer_types"):
            chosen["layer_types"] = [kinds[0], kinds[-1]]
        config = type(default)(**chosen)
        torch.manual_seed(7)
        with torch.device("meta"):
            meta = AutoModelForCausalLM.from_config(config)
        if sum(parameter.numel() for parameter in meta.parameters()) > 2e7:
            pytest.skip(f"{name} has other sizes than the generic ones")
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config).eval()
        run(model)
    except Exception as error:  # noqa: BLE001 - whatever a family says to sizes it does not know
        pytest.skip(f"{name} does not take the generic sizes: {type(error).__name__}")
    return model


def run(model: Any) -> list[torch.Tensor]:
    """Logits of a prompt, and of one more token where the model has a cache."""
    ids = torch.randint(3, 96, (1, TOKENS), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        first = model(ids)
        cache = getattr(first, "past_key_values", None)
        if cache is None:
            return [first.logits]
        return [first.logits, model(ids[:, :1], past_key_values=cache).logits]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_a_family_is_recorded_or_says_why_not(name: str, tmp_path: Path) -> None:
    model = build(name)
    plain = run(model)
    with record(model, tmp_path / "a.kvtrace", dtype="float32", strict=True) as recording:
        found = run(model)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    if name in UNRECORDED:
        assert UNRECORDED[name] in " ".join(recording.gaps)
        return
    assert recording.gaps == {}
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert trace.rows == TOKENS + len(plain) - 1
    assert trace.layers
    if name not in WITHOUT_SINKS:
        check(trace, model)


def check(trace: kvtrace.Trace, model: Any) -> None:
    """Compare with what the model itself gives, where it gives any."""
    model.set_attn_implementation("eager")
    model.config._attn_implementation = "eager"
    ids = torch.randint(3, 96, (1, TOKENS), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        own = model(ids, output_attentions=True).attentions or ()
    rows = slice(0, TOKENS)
    for spec in trace.layers:
        expected = own[spec.layer] if spec.layer < len(own) else None
        if expected is None or expected.shape[-1] != TOKENS:
            continue
        for head in range(spec.num_q_heads):
            weights = trace.attention(spec.layer, head, rows, rows)
            np.testing.assert_allclose(weights, expected[0, head].numpy(), atol=1e-5)
