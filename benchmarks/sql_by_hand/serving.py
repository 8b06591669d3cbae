"""Questions of serving, 1 to 7, in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from benchmarks.sql_by_hand.data import Data, Rows


def spans(d: Data) -> dict[str, Any]:
    """Steps of each request, in order."""
    rows, steps = d.table("rows"), d.table("steps")
    keys, inverse = np.unique(
        np.stack([rows["request"], rows["step"]]), axis=1, return_inverse=True
    )
    context = np.zeros(keys.shape[1], np.int64)
    np.maximum.at(context, inverse, rows["position"] + 1)
    order = np.argsort(steps["step"])
    at = order[np.searchsorted(steps["step"], keys[1], sorter=order)]
    found = {name: steps[name][at] for name in ("started_ns", "duration_ns", "phase")}
    return {"request": keys[0], "step": keys[1], "context": context, **found}


def by_request(d: Data) -> list[tuple[int, dict[str, Any]]]:
    s = spans(d)
    starts = np.flatnonzero(np.diff(s["request"], prepend=-1))
    parts = [slice(a, b) for a, b in zip(starts, [*starts[1:], None], strict=True)]
    return [(int(s["request"][p][0]), {k: v[p] for k, v in s.items()}) for p in parts]


def latency(d: Data) -> Rows:
    prompts = dict(
        zip(*(d.table("requests")[c].tolist() for c in ("request", "prompt_tokens")), strict=True)
    )
    found = []
    for request, s in by_request(d):
        end = (s["started_ns"] - s["started_ns"].min() + s["duration_ns"]) / 1e6
        prompt, tokens = prompts[request], int(s["context"].max())
        first = end[s["context"] >= prompt].min()
        after = end.max() - first
        decoded = int((s["context"] > prompt).sum())
        found.append(
            (
                request,
                prompt,
                tokens - prompt,
                first,
                after / decoded,
                1e3 * (tokens - prompt) / after,
            )
        )
    return sorted(found, key=lambda row: (-row[3], row[0]))[:5]


def slow_steps(d: Data) -> Rows:
    s = spans(d)
    s = {k: v[s["phase"] == "decode"] for k, v in s.items()}
    ms = s["duration_ns"] / 1e6
    top = np.lexsort((s["step"], -ms))[:5]
    return [
        (s["request"][i], s["step"][i], s["context"][i], ms[i], ms[i] / np.median(ms)) for i in top
    ]


def waiting(d: Data) -> Rows:
    found = []
    for request, s in by_request(d):
        order = np.argsort(s["started_ns"])
        start, took = s["started_ns"][order], s["duration_ns"][order]
        ran, wait = took.sum() / 1e6, (start[1:] - (start + took)[:-1]).sum() / 1e6
        found.append((request, len(order), ran, wait, wait / (ran + wait)))
    return sorted(found, key=lambda row: (-round(row[4], 3), row[0]))[:5]


def cache_events(d: Data) -> dict[str, Any]:
    """Events of layers with the request whose step they came with; one sequence a batch."""
    e, rows = d.table("kv_events"), d.table("rows")
    known = ~np.isnan(e["layer"].astype(float)) & ~np.isnan(e["step"].astype(float))
    found = {k: v[known] for k, v in e.items()}
    steps, first = np.unique(rows["step"], return_index=True)
    at = first[np.searchsorted(steps, found["step"].astype(np.int64))]
    return {**found, "owner": rows["request"][at]}


def peak_memory(d: Data) -> Rows:
    e, c = d.table("kv_events"), cache_events(d)
    order = np.lexsort((c["ts_ns"], c["layer"], c["owner"]))
    c = {k: v[order] for k, v in c.items()}
    new = np.diff(c["owner"] * 1000 + c["layer"], prepend=-1) != 0
    change = np.where(new, c["bytes"], np.diff(c["bytes"], prepend=0))
    held = {r: change[c["owner"] == r].sum() for r in np.unique(c["owner"])}
    freed = e["event"] == "free"
    times = np.concatenate([c["ts_ns"], e["ts_ns"][freed]])
    changes = np.concatenate([change, [-held[r] for r in e["request"][freed]]])
    moments, inverse = np.unique(times, return_inverse=True)
    level = np.cumsum(np.bincount(inverse, changes))
    at = int(level.argmax())
    return [(c["device"][0], level[at], int(c["step"][c["ts_ns"] == moments[at]][0]))]


def bytes_per_token(d: Data) -> Rows:
    c, s = cache_events(d), spans(d)
    context = dict(
        zip(
            s["step"][s["request"] == 0].tolist(),
            s["context"][s["request"] == 0].tolist(),
            strict=True,
        )
    )
    found = []
    for layer in np.unique(c["layer"]):
        mine = (c["owner"] == 0) & (c["layer"] == layer)
        at = np.flatnonzero(mine)[c["bytes"][mine].argmax()]
        tokens = context[int(c["step"][at])]
        found.append((int(layer), c["device"][at], c["bytes"][at], tokens, c["bytes"][at] / tokens))
    return found


def frequent_tokens(d: Data) -> Rows:
    t = d.table("tokens")
    texts, inverse, counts = np.unique(
        t["text"].astype(str), return_inverse=True, return_counts=True
    )
    top = sorted(range(len(texts)), key=lambda i: (-counts[i], str(texts[i]).encode()))[:5]
    return [(texts[i], counts[i], len(np.unique(t["request"][inverse == i]))) for i in top]


def complete(d: Data) -> Rows:
    has = d.table("rows")["has_query"]
    return [(len(has), int((~has.astype(bool)).sum()), len(d.table("gaps")["count"]))]
