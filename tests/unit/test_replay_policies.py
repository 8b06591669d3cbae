"""What single policies promise beyond the conformance kit: tables, bases, selection, order."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.reference.heads import random_weights_heads, synthetic_head, with_signals

from kvtrace.errors import InputError
from kvtrace_viewer.replay import POLICIES, Head, Measures, parse_budget, parse_policy, parse_when
from kvtrace_viewer.replay.engine import HeadReplay, Run, replay_layer, workers

ONE_SHOT = sorted(
    name
    for name, kind in POLICIES.items()
    if kind().default_when == "prefill" and not kind.shares_heads and not kind.selects
)
#: Their sets grow by other means than one order of the tokens: a share is drawn, or comes first.
UNORDERED = {"nacl", "criticalkv", "block_keydiff"}


def run(heads: list[Head], policy: str, budgets: list[str], when: str) -> list[HeadReplay]:
    runs = [Run(parse_policy(policy), parse_when(when), [parse_budget(b) for b in budgets])]
    with workers(1) as pool:
        return replay_layer(heads, runs, Measures(), pool, lambda count: None)


def table(folder: Path, numbers: object) -> str:
    path = folder / "heads.json"
    path.write_text(json.dumps(numbers))
    return str(path)


def test_headkv_divides_the_pool_by_the_table(tmp_path: Path) -> None:
    file = table(tmp_path, [[3.0, 1.0], [0.0, 4.0]])
    policy = parse_policy(f"headkv:beta=2,table={file}")
    heads = [
        replace(synthetic_head(1, 200, 200), layer=x, kv_head=h) for x in (0, 1) for h in (0, 1)
    ]
    limits = [int(policy.limits(parse_budget(16), np.array([199]), h)[0]) for h in heads]
    # B - B / beta is everyone's; 4 heads give 8 each to the pool of 32.
    assert limits == [8 + 12, 8 + 4, 8 + 0, 8 + 16]


def test_duo_attention_keeps_a_window_in_streaming_heads(tmp_path: Path) -> None:
    file = table(tmp_path, [[0.9, 0.1]])
    heads = random_weights_heads()
    retrieval, streaming = run(
        heads, f"duo_attention:sinks=2,recent=4,table={file}", ["20"], "step"
    )
    held = np.flatnonzero(streaming.evicted_at[0, :72] > 71)
    assert held.tolist() == [0, 1, 68, 69, 70, 71]
    assert int((retrieval.evicted_at[0] > 71).sum()) == 2 * 20 - 6


@pytest.mark.parametrize(
    ("numbers", "said"),
    [([1, 2], "has shape"), ([[-1.0]], "below 0"), ("x", "numbers"), ([[1.0], [1.0, 2.0]], "JSON")],
)
def test_a_bad_table_is_explained(tmp_path: Path, numbers: object, said: str) -> None:
    policy = parse_policy(f"headkv:table={table(tmp_path, numbers)}")
    with pytest.raises(InputError, match=said):
        policy.limits(parse_budget(4), np.array([9]), synthetic_head(1, 10, 10))


def test_a_table_that_is_missing_or_too_small_is_named(tmp_path: Path) -> None:
    head = replace(synthetic_head(1, 10, 10), layer=3)
    for text in (str(tmp_path / "gone.json"), table(tmp_path, [[1.0]])):
        policy = parse_policy(f"duo_attention:table={text}")
        with pytest.raises(InputError, match=r"cannot be read|has 1 layers of 1 KV heads"):
            policy.limits(parse_budget(4), np.array([9]), head)


@pytest.mark.parametrize("base", ["sliding_window", "oracle", "quest", "adakv", "cake"])
def test_what_scores_no_tokens_is_no_base(base: str) -> None:
    with pytest.raises(InputError, match=f"is {base}, which does not score the tokens"):
        parse_policy(f"chunkkv:base={base}")


def test_a_base_takes_the_keys_that_are_its_own() -> None:
    policy = parse_policy("adakv:base=expected_attention,future=64,alpha=0.1,recent=5")
    assert policy.parameters()["future"] == 64
    assert (policy.sinks, str(policy.recent)) == (4, "5")
    assert policy.signals == {"q", "k", "v", "q_prerope"}
    assert parse_policy(policy.spec).parameters() == policy.parameters()
    with pytest.raises(InputError, match=r"window=3.*knorm takes"):
        parse_policy("adakv:base=knorm,window=3")
    with pytest.raises(InputError, match=r"alpha of adakv is 2\.0"):
        parse_policy("adakv:alpha=2")


@pytest.mark.parametrize("when", ["prefill", "step"])
def test_heads_that_compete_hold_no_more_than_their_budgets_together(when: str) -> None:
    heads = [with_signals(head) for head in random_weights_heads()]
    for policy in ("adakv:window=4", "defensivekv:window=4", "kvzip", "chunkkv:window=4,chunk=3"):
        replays = run(heads, policy, ["25%", "9"], when)
        for b, text in enumerate(("25%", "9")):
            for row in replays[0].runs[0].cuts.rows:
                held = [int((one.evicted_at[b, : row + 1] > row).sum()) for one in replays]
                limit = int(parse_budget(text).limits(np.array([row + 1]))[0])
                assert sum(held) <= 2 * limit
                if policy.startswith("adakv"):
                    assert min(held) >= limit // 5


def test_chunks_stay_whole() -> None:
    heads = random_weights_heads()
    for found in run(heads, "chunkkv:base=knorm,chunk=5", ["17"], "prefill"):
        held = np.flatnonzero(found.evicted_at[0, :40] > 39)
        assert len(held) == 15
        assert set(np.bincount(held // 5)) <= {0, 5}


def test_scissorhands_drops_a_block_at_a_time() -> None:
    (found,) = run([synthetic_head(3, 80, 40)], "scissorhands:drop=25%", ["20"], "step")
    at = found.evicted_at[0]
    times, counts = np.unique(at[at < 80], return_counts=True)
    assert counts.tolist() == [20, *[5] * (len(times) - 1)]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(4, 60), st.sampled_from(["recent_n", "quest", "rocketkv"]))
def test_a_selector_reads_no_more_than_its_budget(seed: int, budget: int, name: str) -> None:
    head = synthetic_head(seed, 70, 40)
    (found,) = run([head], f"{name}:page=4" if name == "quest" else name, [str(budget)], "step")
    rows, read = found.runs[0].select(found.block(64, head.tokens))
    counts = read[0].sum(axis=1)
    assert (counts <= budget + 1).all(), "its own token is read beside the budget"
    assert (counts >= min(budget, 5)).all()
    assert read[0, np.arange(len(rows)), rows].all()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999), st.integers(1, 60), st.sampled_from(["prefill", "step", "every=7"]))
def test_nothing_that_reads_as_much_finds_more_than_top_k(
    seed: int, budget: int, when: str
) -> None:
    head = synthetic_head(seed, 70, 40)
    most = found_mass(head, "top_k", budget, when)
    for other in ("recent_n", "recent_n:sinks=2", "quest:page=4", "rocketkv:window=4,page=4"):
        assert (found_mass(head, other, budget, when) <= most + 1e-6).all()


def found_mass(head: Head, spec: str, budget: int, when: str) -> NDArray[np.float64]:
    """What the rows after the first cut find, all query heads of the group together."""
    (found,) = run([head], spec, [str(budget)], when)
    rows, read = found.runs[0].select(found.block(64, head.tokens))
    attention = head.attention(0, head.tokens).astype(np.float64)
    return np.asarray((attention[:, rows] * read[0]).sum(axis=(0, 2)))


@pytest.mark.parametrize("name", [n for n in ONE_SHOT if n not in UNORDERED])
def test_a_larger_budget_keeps_what_a_smaller_one_kept(name: str) -> None:
    head = with_signals(synthetic_head(6, 120, 100))
    window = {"snapkv", "pyramidkv", "headkv", "cake"}
    spec = f"{name}:window=8" if name in window else name
    (found,) = run([head], spec, ["12", "30", "60", "90"], "prefill")
    held = [set(np.flatnonzero(at > 99)) for at in found.evicted_at]
    for less, more in itertools.pairwise(held):
        assert less <= more
    masses = np.nanmean(found.measures.mass, axis=(1, 2))
    assert (np.diff(masses) >= -1e-6).all()
