"""Kept sets equal those of kvpress on the same q, k, v (tests/reference/kvpress_a.json)."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
from tests.reference.heads import REFERENCE, kvpress_heads

from kvtrace_viewer.replay import POLICIES, Measures, parse_budget, parse_policy, parse_when
from kvtrace_viewer.replay.engine import Run, replay_layer, workers

MARGIN = 1e-6


@cache
def reference() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((REFERENCE / "kvpress_a.json").read_text())
    return found


def entries(rhythm: str) -> list[str]:
    """Reference entries, of policies that we have, that decide at this rhythm."""
    return [
        name
        for name, press in reference()["presses"].items()
        if press["spec"]
        and f"/{rhythm}" in press["spec"]
        and press["spec"].partition("@")[0].partition(":")[0] in POLICIES
    ]


@pytest.mark.parametrize("name", entries("prefill"))
def test_one_shot_sets_are_identical(name: str) -> None:
    events = reference()["presses"][name]["events"]
    evicted = evictions(reference()["presses"][name]["spec"])
    for event in events:
        for head, want in enumerate(event["kept"]):
            kept = np.flatnonzero(evicted[event["layer"]][head][: event["k_len"]] != event["step"])
            if kept.tolist() != want:
                assert event["cut_margin"] is not None, (name, event["layer"], head)
                assert event["cut_margin"][head] <= MARGIN, (name, event["layer"], head)


@pytest.mark.parametrize("name", entries("every"))
def test_decode_sets_are_identical_at_the_first_event_and_in_layer_0(name: str) -> None:
    events = reference()["presses"][name]["events"]
    evicted = evictions(reference()["presses"][name]["spec"])
    first = events[0]["step"]
    tied: set[int] = set()
    for event in events:
        if event["layer"] and event["step"] != first:
            continue
        for head, want in enumerate(event["kept"]):
            at = evicted[event["layer"]][head][: event["step"] + 1]
            if event["layer"] == 0 and event["cut_margin"][head] <= MARGIN:
                tied.add(head)  # from a tie on, either choice is right
            if event["layer"] or head not in tied:
                assert np.flatnonzero(at > event["step"]).tolist() == want, (name, event["layer"])


def evictions(spec: str) -> list[list[np.ndarray[Any, Any]]]:
    """evicted_at by layer and KV head."""
    policy, rest = spec.split("@")
    budget, when = rest.split("/")
    run = Run(parse_policy(policy), parse_when(when), [parse_budget(budget)])
    found = []
    for layer in range(4):
        heads = kvpress_heads(layer)
        with workers(1) as pool:
            replays = replay_layer(heads, [run], Measures(), pool, lambda count: None)
        found.append([replay.evicted_at[0] for replay in replays])
    return found
