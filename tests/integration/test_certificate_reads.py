"""Certificates of policies that choose per query what is read: really read, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.support import tiny
from tests.support.tiny import SHARP
from transformers import AttentionInterface, DynamicCache

import kvtrace
import kvtrace_recorder
from kvtrace import Trace
from kvtrace.cli import main
from kvtrace.errors import InputError
from kvtrace_recorder.certificate import certify
from kvtrace_recorder.certificate import replayed as replayed_files
from kvtrace_recorder.certificate.certify import Options
from kvtrace_viewer.replay import Measures, Result, replay

PROMPT, NEW, PAGE = 40, 12, 4
QUEST = f"quest:page={PAGE}"
ONLY = Options(passes=0, generated=0)

pytestmark = pytest.mark.usefixtures("one_thread", "writer_thread")

Chosen = dict[tuple[int, int], list[NDArray[np.bool_]]]
"""By layer and row: what each KV head's query reads."""


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llama(**SHARP)


@pytest.fixture(scope="module")
def trace(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """A real run of a tiny model of random weights."""
    path = tmp_path_factory.mktemp("reads") / "run.kvtrace"
    ids = torch.randint(3, 64, (1, PROMPT), generator=torch.Generator().manual_seed(5))
    length = {"max_new_tokens": NEW + 1, "min_new_tokens": NEW + 1}
    with kvtrace_recorder.record(model, path, dtype="float32", progress=False):
        model.generate(ids, **length, do_sample=False)
    return kvtrace.open(path)


def replayed(trace: Trace, policy: str, budget: str) -> Result:
    (found,) = replay(trace, [policy], [budget], "prefill", measures=Measures(keep_reads=True))
    return found


def read_by(result: Result, layer: int) -> NDArray[np.bool_]:
    """[row, KV head, key]."""
    return np.unpackbits(result.reads[0][layer].bits, axis=2, count=PROMPT + NEW).astype(np.bool_)


def ids_of(trace: Trace) -> torch.Tensor:
    return torch.tensor(trace.tokens()["token_id"].to_pylist())[None]


def pages(q: torch.Tensor, k: torch.Tensor, budget: int) -> NDArray[np.bool_]:
    """What one query of a group [query head, d] reads of k [key, d]: quest, a key at a time."""
    past = k.shape[0] - 1
    read = np.zeros(past + 1, np.bool_)
    read[past] = True
    worth = []
    for first in range(0, past, PAGE):
        page = k[first : min(first + PAGE, past)]
        high, low = page.max(0).values, page.min(0).values
        worth.append((float(torch.maximum(q * high, q * low).sum()), first))
    for _, first in sorted(worth, reverse=True):
        for j in range(min(first + PAGE, past) - 1, first - 1, -1):
            if read.sum() <= budget:
                read[j] = True
    return read


def truly_selecting(
    model: Any, ids: torch.Tensor, percent: int, given: Chosen | None = None
) -> tuple[torch.Tensor, Chosen]:
    """Log-probabilities after the prompt of a model that reads pages by its own queries.

    Or by what is `given`. And what was read.
    """
    chosen: Chosen = {}

    def attention(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **_: Any) -> Any:
        group, row = q.shape[1] // k.shape[1], k.shape[2] - 1
        if q.shape[2] > 1:
            visible = torch.ones(q.shape[2], k.shape[2]).tril()[None].bool()
        else:
            at = (module.layer_idx, row)
            budget = max(1, row * percent // 100)
            chosen[at] = (
                given[at]
                if given
                else [
                    pages(q[0, h * group : (h + 1) * group, 0], k[0, h], budget)
                    for h in range(k.shape[1])
                ]
            )
            visible = torch.tensor(np.repeat(chosen[at], group, axis=0))[:, None]
        scores = q[0] @ k[0].repeat_interleave(group, 0).transpose(1, 2) * scaling
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        return (weights @ v[0].repeat_interleave(group, 0)).transpose(0, 1)[None], None

    AttentionInterface.register("truly_selecting", attention)
    before = model.config._attn_implementation
    cache, found = DynamicCache(), []
    try:
        model.config._attn_implementation = "truly_selecting"
        with torch.no_grad():
            for start, stop in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, PROMPT + NEW))]:
                found.append(model(ids[:, start:stop], past_key_values=cache).logits[0])
    finally:
        model.config._attn_implementation = before
    return torch.cat(found[1:]).double().log_softmax(1), chosen


def kl_from_full(trace: Trace, model: Any, other: torch.Tensor) -> NDArray[np.float64]:
    with torch.no_grad():
        full = model(ids_of(trace)).logits[0, PROMPT:].double().log_softmax(1)
    return np.asarray((full.exp() * (full - other)).sum(1).numpy())


def test_what_is_enforced_is_what_was_replayed(trace: Trace, model: Any) -> None:
    """A model that attends to just those keys gives the same distributions."""
    result = replayed(trace, QUEST, "30%")
    layers = {layer: read_by(result, layer) for layer in result.reads[0]}
    given = {
        (layer, PROMPT + r): [line[: PROMPT + r + 1] for line in row]
        for layer, rows in layers.items()
        for r, row in enumerate(rows)
    }
    for (_, row), heads in given.items():
        assert all(line.sum() == 1 + row * 30 // 100 and line[row] for line in heads)
    want, _ = truly_selecting(model, ids_of(trace), 30, given)
    (found,) = certify(trace, [result.id], model, options=ONLY)
    kl = kl_from_full(trace, model, want)
    assert kl.mean() > 1e-3, "what is not read must be felt, or nothing is tested"
    np.testing.assert_allclose(found.steps["kl"], kl, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("policy", [QUEST, "rocketkv:window=4", "recent_n"])
def test_where_all_is_read_nothing_changes(trace: Trace, model: Any, policy: str) -> None:
    result = replayed(trace, policy, "100%")
    (found,) = certify(trace, [result.id], model, options=Options(generated=NEW))
    assert found.kl_max < 1e-6
    assert found.generation is not None
    assert found.generation.diverges_at is None
    assert found.live is not None
    assert (found.live.passes, found.live.settled, found.live.jaccard) == (1, True, 1)


def test_the_live_run_is_what_a_running_model_reads(trace: Trace, model: Any) -> None:
    result = replayed(trace, QUEST, "30%")
    want, chosen = truly_selecting(model, ids_of(trace), 30)
    (found,) = certify(trace, [result.id], model, options=Options(generated=0))
    assert found.live is not None
    assert found.live.settled
    assert found.live.passes <= len(trace.layers), "a layer is settled by each pass at least"
    assert found.live.kl_mean == pytest.approx(kl_from_full(trace, model, want).mean(), rel=1e-3)
    events, jaccard = found.live.events, []
    for layer, row in zip(events["layer"], events["position"], strict=True):
        a = read_by(result, layer)[row - PROMPT, :, : row + 1]
        b = np.stack(chosen[layer, row])
        jaccard.append(((a & b).sum(1) / (a | b).sum(1)).mean())
    np.testing.assert_allclose(events["jaccard"], jaccard)
    assert (events["jaccard"][events["layer"] == 0] == 1).all(), "layer 0 has the same queries"
    assert found.live.jaccard < 1, "the live run must differ, or nothing is tested"
    assert events["is_exact"].all()
    (one,) = certify(trace, [result.id], model, options=Options(passes=1, generated=0))
    assert one.live is not None
    assert not one.live.settled
    assert not one.live.events["is_exact"].all()


def test_reads_are_written_for_one_policy_that_chooses(
    trace: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "reads.npz"
    args = ["replay", str(trace.path), "--when", "prefill", "--no-store", "--reads", str(file)]
    assert main([*args, "--policy", QUEST, "--budget", "30%"]) == 0
    with np.load(file) as found:
        assert found["rows"].tolist() == list(range(PROMPT, PROMPT + NEW))
        want = replayed(trace, QUEST, "30%").reads[0]
        for layer, reads in want.items():
            np.testing.assert_array_equal(found[f"layer{layer}"], reads.bits)
    capsys.readouterr()
    assert main([*args, "--policy", "h2o", "--budget", "30%"]) == 1
    assert "does not choose what each query reads" in capsys.readouterr().err
    assert main([*args, "--policy", QUEST, "--budget", "10%..30%/10%"]) == 1
    assert "3 budgets" in capsys.readouterr().err
    args[-1] = str(tmp_path)
    assert main([*args, "--policy", QUEST, "--budget", "30%"]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_nothing_evicted_is_not_run_live(trace: Trace, model: Any) -> None:
    """A policy that decides, and holds all: it crashed."""
    (result,) = replay(trace, ["h2o"], ["100%"], "step")
    (found,) = certify(trace, [result.id], model, options=Options(generated=0))
    assert found.live is None
    assert "evicts nothing" in str(found.live_reason)


@pytest.mark.parametrize("rows", [[40, 42], [40, 41, 42]])
def test_rows_without_their_query_are_missed(
    trace: Trace, monkeypatch: pytest.MonkeyPatch, rows: list[int]
) -> None:
    bits = {f"layer{spec.layer}": np.zeros((2, 2, 7), np.uint8) for spec in trace.layers}

    def write(path: Path, row: dict[str, Any], *more: str) -> None:
        arrays: Any = {"rows": np.array(rows), **bits}
        np.savez(more[-1], **arrays)

    monkeypatch.setattr(replayed_files, "_run", write)
    with pytest.raises(InputError, match="lacks the queries of some rows that quest chooses by"):
        replayed_files.reads(trace.path, {"policy": "quest"}, 0, trace.layers)
