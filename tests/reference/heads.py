"""Attention to replay in tests: real runs of random-weights models, and synthetic arrays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay import Block, Head
from kvtrace_viewer.replay.engine import blocks
from kvtrace_viewer.replay.signals import rotate

REFERENCE = Path(__file__).parent


def kvpress_heads(layer: int, prompt: int = 192) -> list[Head]:
    """The KV heads of one layer of kvpress_a: a tiny random-weights Llama, really run."""
    with np.load(REFERENCE / "kvpress_a.npz") as data:
        q, k, v = (data[f"{name}{layer}"] for name in "qkv")
        before, wo = data[f"q_prerope{layer}"], data["wo"][layer]
    heads = _heads(q, k, v, layer, prompt, num_layers=4)
    by_head = wo.reshape(len(wo), len(q), -1).transpose(1, 0, 2)
    group = len(q) // len(k)
    return [
        replace(
            head,
            q_prerope=before[h * group : (h + 1) * group].transpose(1, 0, 2),
            inv_freq=rope_frequencies(q.shape[2]),
            wo=by_head[h * group : (h + 1) * group],
        )
        for h, head in enumerate(heads)
    ]


def rope_frequencies(head_dim: int) -> NDArray[np.float64]:
    """Llama's, at theta 10,000."""
    return np.asarray(10000.0 ** -(np.arange(0, head_dim, 2) / head_dim))


def with_signals(head: Head) -> Head:
    """The same head with synthetic signals beyond q, k and v where it has none."""
    rng = np.random.default_rng([7, head.kv_head])
    assert head.v is not None
    tokens, group, dim = head.q.shape
    wo = rng.normal(size=(group, 2 * dim, head.v.shape[1])).astype(np.float32)
    score = np.asarray(rng.normal(size=tokens), np.float32)
    score[head.prompt_tokens + 3 :] = np.nan
    frequencies = rope_frequencies(dim)
    before = rotate(head.q, -np.arange(tokens), frequencies).astype(np.float32)
    return replace(
        head,
        q_prerope=before if head.q_prerope is None else head.q_prerope,
        inv_freq=frequencies if head.inv_freq is None else head.inv_freq,
        wo=wo if head.wo is None else head.wo,
        score=score,
    )


def random_weights_heads(tokens: int = 72, prompt: int = 40) -> list[Head]:
    """The KV heads of one layer of a random-weights torch attention, really run on token ids."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(5)
    with torch.no_grad():
        embedding = torch.nn.Embedding(50, 32)
        hidden = torch.nn.functional.rms_norm(
            embedding(torch.randint(50, (tokens,))) + 0.3 * torch.randn(tokens, 32).cumsum(0), (32,)
        )
        shapes = {"q": 4, "k": 2, "v": 2}
        found = {
            name: torch.nn.Linear(32, heads * 8)(hidden).reshape(tokens, heads, 8).transpose(0, 1)
            for name, heads in shapes.items()
        }
    q, k, v = (2.0 * found[name].contiguous().numpy() for name in "qkv")
    return _heads(q, k, v, 0, prompt)


def synthetic_head(seed: int, tokens: int, prompt: int, group: int = 2, **fields: Any) -> Head:
    """A synthetic head: seeded random q, k, v, with a few keys that draw attention."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(tokens, group, 4)).astype(np.float32)
    k = rng.normal(size=(tokens, 4)).astype(np.float32)
    k[rng.integers(0, tokens, 3)] *= 3
    v = rng.normal(size=(tokens, 3)).astype(np.float32)
    return replace(Head(q, k, v, None, 0.7, prompt), **fields)


def attention(head: Head) -> NDArray[np.float32]:
    """All rows of a head, as the engine computes them: [query head, row, key]."""
    buffer = np.empty(head.group * 64 * head.tokens, dtype=np.float32)
    full = np.zeros((head.group, head.tokens, head.tokens), dtype=np.float32)
    for start, stop in blocks(head):
        full[:, start:stop, :stop] = head.rows(start, stop, buffer)
    return full


def full_block(head: Head) -> Block:
    """All rows of a head in one block."""
    return Block(head, 0, head.tokens, attention(head))


def with_lse(head: Head, learned_sink: float | None = None) -> Head:
    """The same head with its log-sum-exp, and a learned sink of that score where given."""
    scores = np.einsum("igd,jd->igj", head.q, head.k).astype(np.float64) * head.scale
    if head.softcap is not None:
        scores = head.softcap * np.tanh(scores / head.softcap)
    distance = np.subtract.outer(np.arange(head.tokens), np.arange(head.tokens))
    visible = (distance >= 0) & (distance < (head.window or head.tokens))
    total = np.where(visible[:, None], np.exp(scores), 0).sum(axis=2)
    if learned_sink is not None:
        total += np.exp(learned_sink)
    lse = np.log(total).astype(np.float32)
    return replace(head, lse=lse, has_sinks=learned_sink is not None)


def _heads(q: Any, k: Any, v: Any, layer: int, prompt: int, num_layers: int = 1) -> list[Head]:
    group = len(q) // len(k)
    scale = float(q.shape[2] ** -0.5)
    return [
        Head(
            q=np.ascontiguousarray(q[h * group : (h + 1) * group].transpose(1, 0, 2)),
            k=k[h],
            v=v[h],
            lse=None,
            scale=scale,
            prompt_tokens=prompt,
            layer=layer,
            kv_head=h,
            num_layers=num_layers,
        )
        for h in range(len(k))
    ]
