"""Questions of policies, 19 and 20, in numpy."""

from __future__ import annotations

import numpy as np
from benchmarks.sql_by_hand.data import Data, Rows


def policies(d: Data) -> Rows:
    r = d.table("replays")
    found = []
    for i in np.flatnonzero(r["decide_when"] == "step"):
        same = (r["budget"] == r["budget"][i]) & (r["decide_when"] == "step")
        place = 1 + int((r["retained_mass"][same] > r["retained_mass"][i]).sum())
        column = {"head": "bound", "layer": "bound_layer", "model": "bound_model"}.get(
            r["bound_scope"][i]
        )
        if r["bound_scope"][i] == "read":
            bounds = r["retained_mass"][same & (r["policy"] == "top_k")].astype(float)
        else:
            bounds = r[column][same].astype(float) if column else np.array([np.nan])
        bound = np.nan if np.isnan(bounds).all() else np.nanmax(bounds)
        counted = r["evictions"][i] or r["bound_scope"][i] == "read"
        lost = bound - r["retained_mass"][i] if counted else np.nan
        rate = r["hits"][i] / (r["hits"][i] + r["misses"][i])
        found.append(
            (place, r["policy"][i], r["budget"][i], r["retained_mass"][i], 1 - bound, lost, rate)
        )
    return sorted(found, key=lambda row: (row[2], row[0]))[:6]


def missed_tokens(d: Data) -> Rows:
    w, r = d.table("replay_wants"), d.table("replay_regrets")
    names = ("replay", "request", "layer", "q_head", "position")
    # Every regret has at least one query that wanted the token: five regrets are enough.
    top = np.flatnonzero(r["regret"] >= np.sort(r["regret"])[-5:].min())
    at = {tuple(r[n][i] for n in names): i for i in top}
    found = []
    for j in np.flatnonzero(np.isin(w["position"], r["position"][top])):
        i = at.get(tuple(w[n][j] for n in names))
        if i is not None:
            key = (w["replay"][j], *(int(w[n][j]) for n in names[2:]))
            found.append(
                (*key, r["evicted_at"][i], w["query"][j], w["attention"][j], r["regret"][i])
            )
    found.sort(key=lambda row: (-row[7], *row[:4], -row[6]))
    return [
        (*row[:4], d.texts[0, row[3]], row[4], row[5], d.texts[0, int(row[5])], *row[6:])
        for row in found[:5]
    ]
