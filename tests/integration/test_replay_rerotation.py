"""Re-rotation against the model's own rotary embedding, applied to its keys before they turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.tiny import SHARP, SIZES, llama
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import kvtrace
from kvtrace import Trace
from kvtrace.cli import main
from kvtrace.errors import InputError
from kvtrace.rope import Rope, rope_error, rope_of, ropes
from kvtrace.testing import SyntheticTrace
from kvtrace_recorder import record
from kvtrace_viewer.replay import Measures, replay
from kvtrace_viewer.replay.result import Result

pytestmark = pytest.mark.usefixtures("one_thread", "writer_thread")
ALL_ROWS = Measures(output_rows=1 << 30)
TOKENS, PROMPT = 40, 28
SCALED = {
    "default": {"rope_theta": 100.0},
    "linear": {"factor": 3.0},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}


def rope_parameters(kind: str) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 1000.0, **SCALED[kind]}


def recorded(model: Any, path: Path) -> tuple[Trace, dict[tuple[int, str], Any]]:
    """A run, and what its projections gave before the rotation: [token, head, width]."""
    torch.manual_seed(4)
    ids = torch.randint(3, 20, (1, TOKENS))
    before: dict[tuple[int, str], Any] = {}
    for number, layer in enumerate(getattr(model.base_model, "layers", ())):
        for name in "qkv":
            projection = getattr(getattr(layer, "self_attn", None), f"{name}_proj", None)
            if projection is not None:
                projection.register_forward_hook(keep(before, (number, name)))
    with torch.no_grad(), record(model, path, dtype="float32", strict=True):
        out = model(ids[:, :PROMPT], use_cache=True)
        for at in range(PROMPT, TOKENS):
            out = model(ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
    return kvtrace.open(path), before


def keep(before: dict[tuple[int, str], Any], key: tuple[int, str]) -> Any:
    def hook(module: Any, operands: Any, output: torch.Tensor) -> None:
        parts = [before[key], output[0]] if key in before else [output[0]]
        before[key] = torch.cat(parts).detach()

    return hook


def naive(
    model: Any, before: dict[tuple[int, str], Any], result: Result, layer: int, kv_head: int
) -> tuple[float, float, float]:
    """Overlap, output error and retained mass of one head, row by row, from what was projected."""
    width = model.config.head_dim
    of_head = {name: before[layer, name].view(TOKENS, -1, width) for name in "qkv"}
    group = of_head["q"].shape[1] // of_head["k"].shape[1]
    q = of_head["q"][:, kv_head * group : (kv_head + 1) * group]
    k, v = of_head["k"][:, kv_head], of_head["v"][:, kv_head]
    gone = result.evicted_at[:, layer, kv_head]

    def attention(row: int, keys: list[int], places: list[int]) -> torch.Tensor:
        """Of the query at the last of `keys`, standing at the last of `places`."""
        cos, sin = model.model.rotary_emb(k[None], torch.tensor([places]))
        queries = q[row].T.new_zeros(1, group, len(keys), width)
        queries[0, :, -1] = q[row]
        turned_q, turned_k = apply_rotary_pos_emb(queries, k[None, None, keys], cos, sin)
        scores = turned_q[0, :, -1] @ turned_k[0, 0].T * width**-0.5
        found: torch.Tensor = scores.double().softmax(dim=-1)
        return found

    sums = np.zeros(3)
    rows = range(result.requests[0].last_cut + 1 if result.when == "prefill" else PROMPT, TOKENS)
    for row in rows:
        kept = [j for j in range(row + 1) if gone[j] < 0 or gone[j] >= row]
        everything = list(range(row + 1))
        full = attention(row, everything, everything)
        renumbered = torch.zeros_like(full)
        renumbered[:, kept] = attention(row, kept, list(range(len(kept))))
        o, o_kept = (a @ v[: row + 1].double() for a in (full, renumbered))
        sums += (
            torch.minimum(full, renumbered).sum(dim=1).mean(),
            ((o_kept - o).norm(dim=1) / o.norm(dim=1)).mean(),
            full[:, kept].sum(dim=1).mean(),
        )
    overlap, error, mass = sums / len(rows)
    return float(overlap), float(error), float(mass)


@pytest.mark.parametrize("kind", SCALED)
def test_scores_are_those_of_keys_turned_to_their_place_in_the_cache(
    kind: str, tmp_path: Path
) -> None:
    model = llama(**SHARP, rope_parameters=rope_parameters(kind))
    trace, before = recorded(model, tmp_path / "a.kvtrace")
    policies = ["streaming_llm:sinks=2", "h2o", "knorm"]
    for when in ("step", "prefill"):
        found = replay(trace, policies, ["40%"], when, measures=ALL_ROWS, rerotate=True)
        plain = replay(trace, policies, ["40%"], when, measures=ALL_ROWS, store=False)
        for one, without in zip(found, plain, strict=True):
            assert one.id == without.id + "-rerotated"
            np.testing.assert_array_equal(one.evicted_at, without.evicted_at)
            assert (one.retained_mass, one.hits) == (without.retained_mass, without.hits)
            assert one.overlap is not None
            assert one.retained_mass is not None
            assert one.overlap < one.retained_mass
            for at, (layer, head) in enumerate(
                zip(one.heads["layer"], one.heads["kv_head"], strict=True)
            ):
                overlap, error, mass = naive(model, before, one, layer, head)
                assert one.heads["overlap"][at] == pytest.approx(overlap, abs=2e-5)
                assert one.heads["output_error"][at] == pytest.approx(error, abs=5e-5)
                assert one.heads["mass"][at] == pytest.approx(mass, abs=2e-5)
            assert one.output_error == pytest.approx(np.mean(one.heads["output_error"]))
    stored = trace.replays().to_pylist()
    assert {row["rerotate"] for row in stored} == {True}
    assert all(row["overlap"] < row["retained_mass"] for row in stored)


def test_nothing_evicted_is_nothing_renumbered(tmp_path: Path) -> None:
    trace, _ = recorded(llama(**SHARP), tmp_path / "a.kvtrace")
    (one,) = replay(trace, ["full"], ["50%"], "step", measures=ALL_ROWS, rerotate=True)
    assert one.overlap == pytest.approx(1, abs=1e-6)
    assert one.output_error == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", SCALED)
def test_frequencies_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    model = llama(**SHARP, rope_parameters=rope_parameters(kind))
    trace, _ = recorded(model, tmp_path / "a.kvtrace")
    found = ropes(trace, trace.layers)
    assert isinstance(found, dict)
    want = (
        model.model.rotary_emb.inv_freq
        if kind == "default"
        else ROPE_INIT_FUNCTIONS[kind](model.config, "cpu")[0]
    )
    for rope in found.values():
        np.testing.assert_allclose(rope.inv_freq, want.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt_neox", {"rotary_pct": 0.5}),
        ("stablelm", {}),
        ("phi", {}),
        ("glm", {}),
        ("cohere", {}),
        ("gptj", {"rotary_dim": 4, "n_embd": 32, "n_layer": 2, "n_head": 4}),
        ("qwen2", {}),
        ("smollm3", {"no_rope_layers": [0, 1]}),
    ],
)
def test_families_turn_as_their_configuration_is_read(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(2)
    config = AutoConfig.for_model(family, **{**SIZES, "initializer_range": 0.5, **options})
    model = AutoModelForCausalLM.from_config(config).eval()
    trace, _ = recorded(model, tmp_path / "a.kvtrace")
    found = ropes(trace, trace.layers)
    assert isinstance(found, dict), found
    keys, ids = trace.layer_data(0).k, trace.tokens()["token_id"].to_numpy()
    assert keys is not None
    error = rope_error(found[0], keys, ids)
    assert error is not None
    assert error < 1e-4
    if found[0].width:
        wrong = rope_error(Rope(found[0].inv_freq, not found[0].is_interleaved), keys, ids)
        assert wrong is not None
        assert wrong > 0.05 or found[0].width == 2


def test_layers_of_two_bases(tmp_path: Path) -> None:
    torch.manual_seed(2)
    sizes = SIZES | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    config = Gemma3TextConfig(**sizes, head_dim=8, initializer_range=0.5)
    trace, _ = recorded(Gemma3ForCausalLM(config).eval(), tmp_path / "a.kvtrace")
    found = ropes(trace, trace.layers)
    assert isinstance(found, dict)
    assert [round(float(found[layer].inv_freq[1] ** -4)) for layer in (0, 1)] == [10_000, 1_000_000]


def test_what_cannot_be_rerotated_is_refused(
    synthetic_trace: SyntheticTrace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(synthetic_trace().path)
    args = ["--policy", "h2o", "--budget", "25%", "--rerotate"]
    assert main(["replay", path, *args]) == 1
    assert "has no rotary positions (rope_theta)" in capsys.readouterr().err
    trace, _ = recorded(llama(**SHARP), tmp_path / "a.kvtrace")
    with pytest.raises(InputError, match="quest chooses per query what is read"):
        replay(trace, ["quest"], ["25%"], rerotate=True)
    assert main(["replay", str(trace.path), *args, "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert one["rerotate"] is True
    assert 0 < one["overlap"] < one["retained_mass"]
    assert "re-rotated: output error and overlap" in one["notes"][0]
    unknown: list[tuple[dict[str, Any], str]] = [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "scaled by dynamic"),
        ({"kv_lora_rank": 512}, "MLA"),
    ]
    for config, why in unknown:
        assert why in str(rope_of(config, trace.layers[0]))


def test_a_configuration_that_the_keys_contradict_is_refused(tmp_path: Path) -> None:
    model = llama(**SHARP, rope_parameters=rope_parameters("default"))
    before = model.config.rope_parameters
    model.config.rope_parameters = before | {"rope_theta": 3.0}
    trace, _ = recorded(model, tmp_path / "a.kvtrace")
    with pytest.raises(InputError, match=r"keys of equal tokens are \d+% apart"):
        replay(trace, ["h2o"], ["25%"], rerotate=True)
