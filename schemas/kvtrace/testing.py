"""Synthetic traces for tests: seeded random q, k, v, marked synthetic wherever they show."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kvtrace.attention import Float, scores, visible
from kvtrace.model import Layer
from kvtrace.trace import Trace
from kvtrace.writer import LayerSpec, TraceWriter

#: A fixture that makes a closed synthetic trace.
SyntheticTrace = Callable[..., Trace]


def write_synthetic(
    writer: TraceWriter, specs: Sequence[LayerSpec], steps: Sequence[int], *, seed: int = 0
) -> None:
    """Fill a trace with one request: `steps[0]` prompt tokens, then steps of `steps[i]` tokens."""
    rng = np.random.default_rng(seed)
    model = writer.add_model(name="synthetic", architecture="none", num_layers=len(specs))
    writer.add_layers(model, specs)
    total = sum(steps)
    data = [
        {
            "q": rng.normal(size=(total, s.num_q_heads, s.head_dim)).astype(np.float32),
            "k": rng.normal(size=(total, s.num_kv_heads, s.head_dim)).astype(np.float32),
            "v": rng.normal(size=(total, s.num_kv_heads, s.value_dim)).astype(np.float32),
        }
        for s in specs
    ]
    for spec, arrays in zip(specs, data, strict=True):
        layer = Layer(model=model, array_group=0, array_index=0, **vars(spec))
        arrays["lse"] = log_sum_exp(arrays["q"], arrays["k"], layer)
    writer.append(
        "requests", {"request": [0], "run": [0], "model": [0], "prompt_tokens": [steps[0]]}
    )
    done = 0
    for number, n in enumerate(steps):
        at = np.arange(done, done + n)
        phase = "prefill" if number == 0 else "decode"
        writer.append("steps", {"step": [number], "model": [model], "phase": [phase]})
        writer.append(
            "rows",
            {
                "row": at,
                "step": np.full(n, number),
                "request": np.zeros(n, np.int64),
                "position": at.astype(np.int32),
                "has_query": np.ones(n, bool),
            },
        )
        writer.append(
            "tokens",
            {
                "request": np.zeros(n, np.int64),
                "position": at.astype(np.int32),
                "token_id": at.astype(np.int32),
                "text": [f"t{i}" for i in at],
                "source": ["prompt" if number == 0 else "generated"] * n,
                "row": at,
            },
        )
        for spec, arrays in zip(specs, data, strict=True):
            writer.append_layer(model, spec.layer, **{k: v[at] for k, v in arrays.items()})
        writer.commit()
        done += n


def log_sum_exp(q: Float, k: Float, layer: Layer, block: int = 256) -> Float:
    """Log-sum-exp of every row of causal self-attention over all tokens.

    Parameters
    ----------
    q : numpy.ndarray
        [token, q_head, head_dim], float32 or wider.
    k : numpy.ndarray
        [token, kv_head, head_dim].
    layer : Layer
        Gives scale, softcap, window, ALiBi's slopes.
    block : int
        Rows at a time: memory is block x token, never token x token.

    Returns
    -------
    numpy.ndarray
        [token, q_head] float32.
    """
    tokens, q_heads, _ = q.shape
    group = q_heads // k.shape[1]
    positions = np.arange(tokens)
    found = np.empty((tokens, q_heads), np.float32)
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        rows = positions[start:stop]
        last = tokens if layer.attention_kind == "bidirectional" else stop
        hidden = ~visible(rows, positions[:last], layer)
        for head in range(q_heads):
            keys = k[:last, head // group]
            row = scores(q[start:stop, head], keys, rows, positions[:last], layer, head)
            row[hidden] = -np.inf
            top = row.max(axis=1)
            found[start:stop, head] = top + np.log(np.exp(row - top[:, None]).sum(axis=1))
    return found
