"""A trace without all queries replays what it still can, as the full trace of the same run does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import kvtrace
from kvtrace import Trace
from kvtrace.errors import InputError
from kvtrace.testing import SyntheticTrace
from kvtrace.writer import LayerSpec, TraceWriter
from kvtrace_recorder.selection import Queries, parse_selection
from kvtrace_viewer.replay import POLICIES, Policy, replay, replayable
from kvtrace_viewer.replay.result import Result

STEPS = [90, 1, 1, 1, 1, 1]
SPECS = [
    LayerSpec(0, 4, 2, 16, 16, 0.25),
    LayerSpec(1, 4, 2, 16, 16, 0.25, attention_kind="sliding", sliding_window=40),
    LayerSpec(2, 4, 2, 16, 16, 0.25, softcap=5.0),
]
BUDGETS = ["25%", "12"]
SAME = ("hits", "misses", "evictions", "ties", "measured_rows", "exactness", "output_rows")
CLOSE = ("retained_mass", "mass_p5", "mass_worst", "output_error", "bound")


def thinned(full: Trace, path: Path, queries: Queries, *, received: bool = True) -> Trace:
    """The same run as a recorder with `queries` would have written it."""
    (prompt,) = (one.prompt_tokens for one in full.requests())
    tokens = full.rows
    kept = queries.of(0, tokens, prompt)
    with TraceWriter(path, source="synthetic", dtype="float32") as writer:
        writer.add_model(name="synthetic", num_layers=len(full.layers))
        writer.add_layers(0, SPECS)
        for table in ("requests", "tokens"):
            columns = full.table(table).to_pydict()
            writer.append(table, columns)
        writer.append("steps", {"step": [0], "model": [0], "phase": ["prefill"]})
        rows = full.table("rows").to_pydict()
        writer.append("rows", rows | {"step": [0] * tokens, "has_query": kept})
        for spec in SPECS:
            data = full.layer_data(spec.layer)
            assert data.q is not None
            assert data.lse is not None
            writer.append_layer(
                0, spec.layer, q=data.q[kept], lse=data.lse[kept], k=data.k, v=data.v
            )
            if received:
                maps = [full.attention(spec.layer, head)[:prompt] for head in range(4)]
                sums = np.stack([a[:, :prompt].sum(axis=0) for a in maps], axis=1)
                writer.add_received(0, spec.layer, np.arange(prompt), sums)
    return kvtrace.open(path)


@pytest.fixture
def full(synthetic_trace: SyntheticTrace) -> Trace:
    """A run with every query."""
    return synthetic_trace(steps=STEPS, specs=SPECS)


def agree(found: Result, want: Result) -> None:
    assert found.kept().keys() == want.kept().keys()
    for layer, heads in want.kept().items():
        for head, positions in heads.items():
            np.testing.assert_array_equal(found.kept()[layer][head], positions)
    for name in SAME:
        assert getattr(found, name) == getattr(want, name), name
    for name in CLOSE:
        one, other = getattr(found, name), getattr(want, name)
        assert one == other or one == pytest.approx(other, rel=1e-5), name


def needs_at_most(policy: Policy, queries: int) -> bool:
    """Whether a policy needs no more of the prompt's queries, of those that need no more than v."""
    needed = policy.prompt_queries
    enough = policy.takes_received or (needed is not None and needed <= queries)
    return enough and policy.signals <= {"q", "k", "v"}


@pytest.mark.parametrize("when", ["prefill", "step", "every=2"])
def test_policies_that_need_the_last_queries_agree(full: Trace, tmp_path: Path, when: str) -> None:
    less = thinned(full, tmp_path / "less.kvtrace", Queries(last=16))
    names = [name for name, kind in POLICIES.items() if needs_at_most(kind(), 16)]
    voting = [f"{name}:window=8" for name in ("pyramidkv", "adakv", "headkv", "chunkkv", "cake")]
    more = ["snapkv:window=16", "nacl:proxies=8", "rocketkv:window=8", "h2o:renormalise=false"]
    policies = [*names, *voting, *more]
    pairs = zip(
        replay(less, policies, BUDGETS, when, store=False),
        replay(full, policies, BUDGETS, when, store=False),
        strict=True,
    )
    for found, want in pairs:
        agree(found, want)


def test_what_cannot_be_replayed_is_refused_with_the_reason(full: Trace, tmp_path: Path) -> None:
    less = thinned(full, tmp_path / "less.kvtrace", Queries(last=16), received=False)
    for policy, when, reason in [
        ("lru", "step", "needs the attention of the whole prompt, and .* the trace kept last=16"),
        ("h2o", "prefill", "and no `received`"),
        ("snapkv", "prefill", "needs the last 64 queries"),
        ("streaming_llm", "stream", "stream cuts and measures inside the prompt"),
    ]:
        with pytest.raises(InputError, match=reason):
            replay(less, [policy], BUDGETS, when, store=False)
    rows = {row["policy"]: row for row in replayable(less)}
    assert {
        name: row["replay"] for name, row in rows.items() if row["replay"] == "no"
    } == dict.fromkeys(
        (
            *("lru", "lfu", "h2o", "observed_attention", "scissorhands", "keyformer", "snapkv"),
            *("pyramidkv", "adakv", "headkv", "criticalkv", "defensivekv", "chunkkv", "cake"),
            *("nacl", "expected_attention", "rocketkv", "recorded", "kvzip"),
        ),
        "no",
    )
    assert rows["streaming_llm"]["reason"].startswith("position alone decides: exact, with --when")
    assert rows["tova"]["replay"] == "approximately"


def test_a_thinned_trace_says_what_it_holds(full: Trace, tmp_path: Path) -> None:
    assert full.queries == "all"
    less = thinned(full, tmp_path / "less.kvtrace", Queries(last=16))
    assert less.queries == "last=16"
    assert less.signals == {"k", "v", "received"}
    held = less.holdings()
    assert held.last_prompt_queries == 16
    assert held.has_decoded_queries
    assert held.layers_with("k", "v", "received") == [0, 1, 2]
    some = thinned(full, tmp_path / "some.kvtrace", Queries(every=7))
    assert some.queries == "every=7"
    a, b = some.attention(1, 3), full.attention(1, 3)
    known = np.asarray(~np.isnan(a[:, 0]))
    assert np.flatnonzero(~known[:14]).tolist() == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13]
    np.testing.assert_allclose(a[known], b[known], atol=1e-6)
    assert np.isnan(a[~known]).all()
    with pytest.raises(InputError, match="kept every=7 of the prompt's; ask for other rows"):
        some.attention(0, 0, rows=slice(1, 7))


def test_values_and_layers_that_end_are_left_out(full: Trace, tmp_path: Path) -> None:
    path = tmp_path / "ends.kvtrace"
    with TraceWriter(path, source="synthetic", dtype="float32") as writer:
        writer.add_model(name="synthetic", num_layers=3)
        writer.add_layers(0, SPECS)
        for table in ("requests", "tokens"):
            writer.append(table, full.table(table).to_pydict())
        for step, part in enumerate((np.arange(92), np.arange(92, 95))):
            writer.append("steps", {"step": [step], "model": [0]})
            writer.append(
                "rows",
                {
                    "row": part,
                    "step": np.full(len(part), step),
                    "request": np.zeros(len(part), np.int64),
                    "position": part,
                    "has_query": np.ones(len(part), bool),
                },
            )
            for spec in SPECS:
                data = full.layer_data(spec.layer)
                kinds = ("q", "k", "v", "lse") if step == 0 else ("q", "k", "lse")
                arrays = {kind: getattr(data, kind)[part] for kind in kinds}
                gone = step == 1 and spec.layer == 1
                writer.append_layer(0, spec.layer, **({} if gone else arrays))
    ends = kvtrace.open(path)
    assert ends.holdings().layers_with("k") == [0, 2]
    assert ends.holdings().layers_with("k", "v") == []
    with pytest.raises(InputError, match="lacks v in some layers"):
        replay(ends, ["lagkv"], BUDGETS, store=False)
    found, want = (replay(x, ["h2o"], ["12"], store=False)[0] for x in (ends, full))
    assert found.output_error is None
    assert any("layers 1 are left out" in note for note in found.notes)
    assert set(found.kept()) == {0, 2}
    for layer, heads in found.kept().items():
        for head, positions in heads.items():
            np.testing.assert_array_equal(want.kept()[layer][head], positions)


def test_chosen_heads_keep_their_numbers(full: Trace, tmp_path: Path) -> None:
    path = tmp_path / "heads.kvtrace"
    specs = [LayerSpec(1, 2, 1, 16, 16, 0.25, kv_heads=(1,), sliding_window=40)]
    selection = parse_selection(layers=[1], heads="1").to_json()
    with TraceWriter(path, source="synthetic", dtype="float32", selection=selection) as writer:
        writer.add_model(name="synthetic", num_layers=3)
        writer.add_layers(0, specs)
        for table in ("requests", "tokens"):
            writer.append(table, full.table(table).to_pydict())
        writer.append("steps", {"step": [0], "model": [0]})
        writer.append("rows", full.table("rows").to_pydict())
        data = full.layer_data(1)
        assert data.q is not None
        assert data.lse is not None
        assert data.k is not None
        assert data.v is not None
        writer.append_layer(
            0, 1, q=data.q[:, 2:], lse=data.lse[:, 2:], k=data.k[:, 1:], v=data.v[:, 1:]
        )
    some = kvtrace.open(path)
    np.testing.assert_array_equal(some.attention(1, 3), full.attention(1, 3))
    with pytest.raises(InputError, match="head 1 was not found in layer 1; it has 2-3"):
        some.attention(1, 1)
    with pytest.raises(InputError, match="decides from all heads of a layer"):
        replay(some, ["tova"], BUDGETS, store=False)
    # pyramidkv gives this layer the share of the second of three, as on the full trace.
    for policy in ("h2o", "pyramidkv:window=2"):
        found, want = (replay(x, [policy], ["40"], store=False)[0] for x in (some, full))
        assert list(found.kept()) == [1]
        assert list(found.kept()[1]) == [1]
        np.testing.assert_array_equal(found.kept()[1][1], want.kept()[1][1])
