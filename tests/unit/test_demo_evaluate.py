"""The numbers on the demo model's card mean what the card says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvtrace_recorder.demo.card import render, table, verdict
from kvtrace_recorder.demo.evaluate import (
    BUCKETS,
    FIRST_QUERY,
    SHORT,
    attention_profile,
    attentions,
    history,
    loss_by_position,
    losses,
    short_context,
    windows,
)


@pytest.fixture(scope="module")
def tiny() -> LlamaForCausalLM:
    torch.set_num_threads(1)
    torch.manual_seed(5)  # synthetic weights
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
    )
    return LlamaForCausalLM(config).eval()


def test_windows_begin_with_bos_and_cover_the_stream() -> None:
    stream = np.arange(1, 1001, dtype=np.uint16)  # synthetic
    found = windows(stream, 100, 4)
    assert found.shape == (4, 100)
    assert (found[:, 0] == 0).all()
    assert found[0, 1] == 1
    assert found[-1, 1] == 901


def test_losses_equal_the_models_own(tiny: LlamaForCausalLM) -> None:
    ids = torch.randint(0, 32, (2, 40))
    with torch.no_grad():
        expected = float(tiny(input_ids=ids, labels=ids).loss)
    assert float(losses(tiny, ids).mean()) == pytest.approx(expected, rel=1e-5)


def test_buckets_hold_the_positions_they_name() -> None:
    nats = torch.arange(1, BUCKETS[-1], dtype=torch.float32)[None]  # loss = its position
    found = loss_by_position(nats)
    assert list(found)[:2] == ["1-63", "64-255"]
    for name, value in found.items():
        low, high = map(int, name.split("-"))
        assert value == pytest.approx((low + high) / 2)


def test_short_windows_hold_the_same_tokens() -> None:
    ids = torch.arange(1, 2 * SHORT + 2).repeat(2, 1)
    ids[:, 0] = 0
    cut = short_context(ids)
    assert cut.shape == (4, SHORT + 1)
    assert (cut[:, 0] == 0).all()
    assert torch.equal(cut[:, 1:].reshape(2, -1), ids[:, 1:])


def test_the_profile_is_the_mean_over_late_queries(tiny: LlamaForCausalLM) -> None:
    ids = torch.randint(0, 32, (2, FIRST_QUERY + 36))
    weights = torch.stack(list(attentions(tiny, ids)))
    assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
    profile = attention_profile(tiny, ids)
    late = weights[:, :, :, FIRST_QUERY:]
    torch.testing.assert_close(torch.tensor(profile["bos"]), late[..., 0].mean(dim=(0, 3)))
    before = torch.stack([weights[:, :, :, q, q - 1] for q in range(FIRST_QUERY, ids.shape[1])])
    torch.testing.assert_close(torch.tensor(profile["previous"]), before.mean(dim=(0, 1)))
    assert all(0.05 <= share <= 1 for row in profile["top"] for share in row)
    assert tiny.config._attn_implementation == "sdpa"


def evaluation(bos: float) -> dict[str, Any]:
    """Make a synthetic evaluation whose strongest head gives position 0 a share of `bos`."""
    heads = [[0.01, bos], [0.02, 0.03]]
    return {
        "loss": 4.0,
        "loss_4096": 4.1,
        "loss_by_position": {"1-63": 4.5, "64-255": 4.0},
        "loss_by_position_short": {"1-63": 4.5, "64-255": 4.2},
        "attention": {"bos": heads, "previous": heads, "top": heads},
        "copying": {"induction": heads, "first": 4.0, "second": 3.5},
        "read": [("\n", 0.1, 0.05)],
        "parameters": 5_000_000,
        "tokens_seen": 15_000_000,
        "train_tokens": 30_000_000,
        "steps": 4000,
        "training_minutes": 90.0,
        "history": [{"tokens": 5_000_000, "length": 512, "lr": 1e-3, "heldout": 4.5}],
        "sources": [{"name": "some-doc", "licence": "MIT", "train_bytes": 2_500_000}],
    }


def test_the_card_says_honestly_whether_there_are_sinks() -> None:
    assert "BOS sinks: no" in verdict(evaluation(0.1))
    assert "BOS sinks: yes, in 1 of 4 heads" in verdict(evaluation(0.5))


def test_the_card_names_sources_and_numbers() -> None:
    config = LlamaConfig(head_dim=32, num_key_value_heads=2).to_dict()
    text = render(evaluation(0.1), config)
    assert "| some-doc | MIT | 2.5 |" in text
    assert "15.0 million tokens (0.50 epochs)" in text
    assert "| 5.0 | 512 | 1.0e-03 | 4.50 |" in text
    assert json.dumps("\n") in text
    assert "{" not in text.replace("{}", "")


def test_the_history_is_thinned_and_keeps_the_end(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    lines = [{"step": n, "heldout": 9.0 - n} if n % 2 else {"step": n} for n in range(100)]
    log.write_text("\n".join(map(json.dumps, lines)))
    steps = [entry["step"] for entry in history(log, rows=5)]
    assert steps[-1] == 99
    assert steps == sorted(steps)
    assert 5 <= len(steps) <= 6


def test_tables_are_percentages_by_layer_and_head() -> None:
    assert table([[0.5, 0.25]]).splitlines()[-1] == "| 0 | 50.0 | 25.0 |"


def test_the_card_admits_when_far_positions_cost_more() -> None:
    found = evaluation(0.1)
    assert "Long contexts: yes" in verdict(found)
    found["loss_by_position"]["64-255"] = 4.5
    assert "Long contexts: not to the end" in verdict(found)
    assert "costs 0.30 nats more" in verdict(found)
