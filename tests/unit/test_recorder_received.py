"""What keys received and rows' log-sum-exps, computed in blocks, equal the plain sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kvtrace
from kvtrace.model import Layer
from kvtrace.testing import log_sum_exp
from kvtrace.writer import LayerSpec, TraceWriter
from kvtrace_recorder.lse import KeyHistory, row_lse
from kvtrace_recorder.taps import received
from kvtrace_recorder.taps.received import row_sums

Q_HEADS, KV_HEADS, WIDTH, TOKENS = 4, 2, 8, 90
FORMS: list[dict[str, Any]] = [
    {},
    {"sliding_window": 17, "attention_kind": "sliding"},
    {"softcap": 3.0},
    {"alibi_slopes": (0.5, 0.25, 0.125, 0.0625)},
    {"attention_kind": "bidirectional"},
    {"position_bias": ((0.5, 0.25, 1.0), (1.0, 2.0, 3.0), (0.0, 1.0, 0.0), (2.0, 0.0, -1.0))},
]


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Seeded q [q_head, token, width], k [kv_head, token, width] and sinks."""
    generator = torch.Generator().manual_seed(5)
    q = 2 * torch.randn(Q_HEADS, TOKENS, WIDTH, generator=generator)
    k = 2 * torch.randn(KV_HEADS, TOKENS, WIDTH, generator=generator)
    return q, k, torch.randn(Q_HEADS, generator=generator)


def plain(q: torch.Tensor, k: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    """Scores [q_head, query, key] in float64, hidden ones minus infinity."""
    scores = torch.einsum("hqd,hkd->hqk", q.double(), k.double().repeat_interleave(2, dim=0))
    scores = scores * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)[None, :]
    if spec.alibi_slopes is not None:
        scores = scores - torch.tensor(spec.alibi_slopes)[:, None, None] * distance
    if spec.position_bias is not None:
        # Three numbers: distances -1 to 1.
        scores = scores + torch.tensor(spec.position_bias)[:, (-distance).clamp(-1, 1) + 1]
    if spec.attention_kind != "bidirectional":
        hidden = distance < 0
        if spec.sliding_window is not None:
            hidden = hidden | (distance >= spec.sliding_window)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_sums_equal_the_plain_ones(
    form: dict[str, Any], has_sinks: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(received.BLOCK_SCORES, "cpu", block)
    q, k, logits = tensors()
    sinks = logits if has_sinks else None
    spec = LayerSpec(0, Q_HEADS, KV_HEADS, WIDTH, WIDTH, 0.4, has_sinks=has_sinks, **form)
    found = row_sums(q, k, 0, 0, spec, dtype=torch.float32, sinks=sinks)
    scores = plain(q, k, spec)
    lse = scores.logsumexp(dim=2)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.double()[:, None])
    torch.testing.assert_close(found.lse.double(), lse.T, atol=1e-5, rtol=0)
    assert found.received is not None
    weights = (scores - lse[:, :, None]).exp()
    torch.testing.assert_close(found.received.double(), weights.sum(dim=1).T, atol=1e-5, rtol=0)
    history = KeyHistory()
    history.extend(k.transpose(0, 1).numpy())
    extra = None if sinks is None else sinks.numpy()
    by_writer = row_lse(q.transpose(0, 1).numpy(), history, np.arange(TOKENS), spec, extra)
    np.testing.assert_allclose(found.lse.numpy(), by_writer, atol=1e-5)


@pytest.mark.parametrize("form", FORMS[:4])
def test_parts_of_a_prompt_add_up(form: dict[str, Any]) -> None:
    q, k, _ = tensors()
    spec = LayerSpec(0, Q_HEADS, KV_HEADS, WIDTH, WIDTH, 0.4, **form)
    whole = row_sums(q, k, 0, 0, spec, dtype=torch.float16)
    assert whole.received is not None
    total = torch.zeros_like(whole.received)
    for start, stop in ((0, 30), (30, 31), (31, TOKENS)):
        # A sliding cache has dropped what no query of the part sees.
        first = 0 if spec.sliding_window is None else max(0, start - spec.sliding_window + 1)
        part = row_sums(q[:, start:stop], k[:, first:stop], start, first, spec, dtype=torch.float16)
        torch.testing.assert_close(part.lse, whole.lse[start:stop], atol=1e-5, rtol=0)
        assert part.received is not None
        total[first:stop] += part.received
    torch.testing.assert_close(total, whole.received, atol=1e-4, rtol=0)


def test_sums_are_over_what_is_stored() -> None:
    q, k, _ = tensors()
    spec = LayerSpec(0, Q_HEADS, KV_HEADS, WIDTH, WIDTH, 0.4)
    rounded = row_sums(q, k, 0, 0, spec, dtype=torch.float16, received=False)
    assert rounded.received is None
    layer = Layer(model=0, array_group=0, array_index=0, **vars(spec))
    stored_q, stored_k = (x.half().float().transpose(0, 1).numpy() for x in (q, k))
    expected = log_sum_exp(stored_q, stored_k, layer)
    np.testing.assert_allclose(rounded.lse.numpy(), expected, atol=1e-5)
    large = row_sums(q * 1e5, k, 0, 0, spec, dtype=torch.float16)
    assert torch.isfinite(large.lse).all()


def test_a_trace_adds_up_what_comes_later(tmp_path: Path) -> None:
    """Steps of one request: the second adds to keys whose rows were committed by the first."""
    with TraceWriter(tmp_path / "a.kvtrace", source="synthetic", detail="summary") as writer:
        model = writer.add_model(name="synthetic", num_layers=1)
        writer.add_layers(model, [LayerSpec(0, Q_HEADS, KV_HEADS, WIDTH, WIDTH, 0.4)])
        writer.append("requests", {"request": [0], "run": [0], "model": [0], "prompt_tokens": [5]})
        for step, part in enumerate((np.arange(3), np.arange(3, 5))):
            writer.append("steps", {"step": [step], "model": [0]})
            columns = {"step": [step] * len(part), "request": [0] * len(part)}
            has_query = np.zeros(len(part), bool)
            writer.append(
                "rows", {"row": part, "position": part, "has_query": has_query, **columns}
            )
            norms = np.ones((len(part), KV_HEADS), np.float32)
            writer.append_layer(model, 0, key_norm=norms, value_norm=norms)
            keys = np.arange(part[-1] + 1)
            writer.add_received(model, 0, keys, np.full((len(keys), Q_HEADS), step + 1.0))
            writer.commit()
            live = kvtrace.open(tmp_path / "a.kvtrace").row_array("received", 0)
            assert live[:, 0].tolist() == ([1, 1, 1] if step == 0 else [3, 3, 3, 2, 2])
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert trace.row_array("received", 0)[:, 0].tolist() == [3, 3, 3, 2, 2]
    assert trace.holdings().layers[0] == {"key_norm", "value_norm", "received"}
