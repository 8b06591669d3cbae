"""Questions of heads, 8 to 13, in numpy."""

from __future__ import annotations

import numpy as np
from benchmarks.sql_by_hand.data import Data, Rows

from kvtrace.marks import HEAVY_FACTOR, SINK_SHARE


def marked(d: Data, kind: str) -> np.ndarray:
    k = d.table("key_attention")
    sinks = (
        (k["far_queries"] > 0)
        & (k["far_received"] >= SINK_SHARE * k["far_queries"])
        & k["seen_at_end"].astype(bool)
    )
    if kind == "sink":
        return np.flatnonzero(sinks)
    return np.flatnonzero(
        (k["uniform"] > 0) & (k["received"] >= HEAVY_FACTOR * k["uniform"]) & ~sinks
    )


def by_token(d: Data, at: np.ndarray, strength: np.ndarray) -> Rows:
    k = d.table("key_attention")
    keys, inverse, heads = np.unique(
        np.stack([k["request"][at], k["position"][at]]),
        axis=1,
        return_inverse=True,
        return_counts=True,
    )
    most = np.zeros(len(heads))
    np.maximum.at(most, inverse, strength)
    return [
        (r, p, d.texts[r, p], n, m)
        for (r, p), n, m in zip(keys.T.tolist(), heads.tolist(), most, strict=True)
    ]


def sink_tokens(d: Data) -> Rows:
    k, at = d.table("key_attention"), marked(d, "sink")
    at = at[k["far_queries"][at] >= 64]
    rows = by_token(d, at, k["far_received"][at].astype(float) / k["far_queries"][at])
    return sorted(rows, key=lambda row: (-row[3], -round(row[4], 3), row[0], row[1]))[:5]


def heavy_tokens(d: Data) -> Rows:
    k, at = d.table("key_attention"), marked(d, "heavy")
    rows = by_token(d, at, k["received"][at].astype(float) / k["uniform"][at])
    return sorted(rows, key=lambda row: (-row[3], row[0], row[1]))[:5]


def sink_heads(d: Data) -> Rows:
    k, h = d.table("key_attention"), d.table("head_attention")
    names = ("request", "layer", "q_head")
    key = np.ravel_multi_index([k[n] for n in names], [int(k[n].max()) + 1 for n in names])
    of_head = np.ravel_multi_index([h[n] for n in names], [int(k[n].max()) + 1 for n in names])
    at = marked(d, "sink")
    total = np.bincount(key, k["received"].astype(float), minlength=of_head.max() + 1)
    of_sinks = np.bincount(key[at], k["received"][at].astype(float), minlength=len(total))
    counts = np.bincount(key[at], minlength=len(total))
    share = of_sinks[of_head] / total[of_head]
    top = np.lexsort((h["q_head"], h["layer"], h["request"], -share.round(3)))[:5]
    return [
        (*(h[n][i] for n in names), counts[of_head[i]], share[i], h["local_share"][i]) for i in top
    ]


def local_heads(d: Data) -> Rows:
    h = d.table("head_attention")
    found = []
    for layer in np.unique(h["layer"]):
        share = h["local_share"][(h["layer"] == layer) & (h["request"] == 0)]
        found.append((layer, len(share), int((share > 0.95).sum()), share.mean()))
    return found


def entropies(d: Data) -> Rows:
    h = d.table("head_attention")
    found = []
    for layer in np.unique(h["layer"]):
        e = h["entropy_share"][h["layer"] == layer]
        found.append((layer, e.min(), e.mean(), e.max(), h["sparsity"][h["layer"] == layer].mean()))
    return found


def groups_agree(d: Data) -> Rows:
    k, at = d.table("key_attention"), marked(d, "heavy")
    at = at[k["request"][at] == 0]
    keys, heads = np.unique(
        np.stack([k[n][at] for n in ("layer", "kv_head", "position")]), axis=1, return_counts=True
    )
    found = []
    for layer, kv_head in np.unique(keys[:2], axis=1).T[:6]:
        n = heads[(keys[0] == layer) & (keys[1] == kv_head)]
        found.append((layer, kv_head, len(n), (n == 1).sum(), (n == 2).sum(), (n > 2).sum()))
    return found
