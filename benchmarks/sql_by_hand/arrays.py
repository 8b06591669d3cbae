"""Questions of the arrays, 14 to 18, in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from benchmarks.sql_by_hand.data import Data, Rows

from kvtrace import attention


def weights(d: Data, layer: int, head: int, rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
    data = d.layer(layer)
    at = data.spec.q_head_index(head)
    k = data.k[keys, at // data.spec.group_size]
    return attention.weights(data.q[rows, at], k, data.lse[rows, at], rows, keys, data.spec, at)


def last_token(d: Data) -> Rows:
    last = d.layer(2).n - 1
    found = weights(d, 2, 1, np.array([last]), np.arange(last + 1))[0]
    top = np.argsort(-found, kind="stable")[:5]
    return [(i, d.texts[0, int(i)], found[i]) for i in top]


def prompt_share(d: Data) -> Rows:
    prompt, total = d.trace.requests()[0].prompt_tokens, d.layer(0).n
    keys, found = np.arange(prompt), []
    for layer in range(len(d.trace.layers)):
        first = weights(d, layer, 0, np.arange(prompt, min(prompt + 20, total)), keys)
        late = weights(d, layer, 0, np.arange(max(total - 20, prompt + 20), total), keys)
        found.append((layer, first.sum(1).mean(), late.sum(1).mean() if len(late) else None))
    return found


def heads_by(d: Data, rows: np.ndarray, keys: np.ndarray, extra: tuple[Any, ...] = ()) -> Rows:
    """Mean attention of rows on one key each, for every head; the five largest."""
    found = []
    for spec in d.trace.layers:
        data = d.layer(spec.layer)
        for head in range(spec.num_q_heads):
            q, k = data.q[rows, head], data.k[keys, head // spec.group_size]
            paid = np.exp(np.einsum("nd,nd->n", q, k) * spec.scale - data.lse[rows, head])
            found.append((spec.layer, head, *extra, paid.mean()))
    return sorted(found, key=lambda row: (-round(float(row[-1]), 3), row[0], row[1]))[:5]


def previous_token(d: Data) -> Rows:
    prompt = d.trace.requests()[0].prompt_tokens
    rows = np.arange(prompt - 64, prompt)
    return heads_by(d, rows, rows - 1)


def induction(d: Data) -> Rows:
    t, prompt = d.table("request_tokens"), d.trace.requests()[0].prompt_tokens
    ids = t["token_id"][t["request"] == 0]
    pairs = []
    for b in range(prompt - 128, prompt):
        earlier = np.flatnonzero(ids[: b - 1] == ids[b])
        if len(earlier):
            pairs.append((b, earlier[-1] + 1))
    rows, keys = np.array(pairs).T
    return heads_by(d, rows, keys, (len(rows),))


def short_keys(d: Data) -> Rows:
    k = d.table("key_attention")
    norm = np.sqrt((d.layer(1).k[:, 0] ** 2).sum(1))
    mine = np.flatnonzero((k["request"] == 0) & (k["layer"] == 1) & (k["kv_head"] == 0))
    most = np.zeros(len(norm))
    np.maximum.at(most, k["position"][mine], k["received"][mine].astype(float) / k["uniform"][mine])
    return [(i, d.texts[0, int(i)], norm[i], most[i]) for i in np.argsort(norm, kind="stable")[:5]]
