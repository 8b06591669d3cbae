"""Signals beyond q, k and v reach the policies that declare them, and only those."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.reference.heads import REFERENCE

import kvtrace
from kvtrace.cli import main
from kvtrace.errors import InputError
from kvtrace.testing import SyntheticTrace
from kvtrace.trace import Trace
from kvtrace.writer import LayerSpec
from kvtrace_viewer.replay import Block, Cuts, Head, Policy, replay
from kvtrace_viewer.replay.signals import extra_signals, fitted_frequencies, missing, rotate

LLAMA = 10000.0 ** -(np.arange(0, 16, 2) / 16)


@dataclass(frozen=True, kw_only=True)
class Declares(Policy):
    """A policy of the test: records what its heads hold."""

    name: ClassVar[str] = "declares"
    signals: ClassVar[frozenset[str]] = frozenset({"q_prerope", "wo", "score"})
    default_when: ClassVar[str] = "prefill"
    seen: ClassVar[list[Head]] = []

    def scores(self, block: Block, cuts: Cuts, state: Any) -> NDArray[np.float64]:
        """Recorded."""
        self.seen.append(block.head)
        assert block.head.score is not None
        score = block.head.score[: block.stop].astype(np.float64)
        return np.broadcast_to(score, (len(cuts.rows), block.stop))


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """kvpress_a, a random-weights Llama, with scores that count down."""
    folder = tmp_path_factory.mktemp("signals")
    with np.load(REFERENCE / "kvpress_a.npz") as file:
        arrays = dict(file)
    for layer in range(4):
        arrays[f"score{layer}"] = np.tile(-np.arange(216.0), (2, 1))
    np.savez(folder / "a.npz", **arrays)
    out = folder / "a.kvtrace"
    assert main(["import", "qkv-npz", str(folder / "a.npz"), "--out", str(out)]) == 0
    return kvtrace.open(out)


def test_declared_signals_are_there_by_head(imported: Trace) -> None:
    Declares.seen.clear()
    result = replay(imported, [Declares()], [50], requests=[0], store=False)[0]
    assert result.exactness == "E3"
    assert all(p.tolist() == [*range(50)] for h in result.kept().values() for p in h.values())
    head = next(h for h in Declares.seen if (h.layer, h.kv_head) == (2, 1))
    with np.load(REFERENCE / "kvpress_a.npz") as file:
        assert head.q_prerope is not None
        assert head.wo is not None
        np.testing.assert_array_equal(head.q_prerope[:, 3], file["q_prerope2"][7])
        outputs = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
        found = np.einsum("gv,ghv->h", outputs, head.wo)
        want = file["wo"][2][:, 4 * 16 :] @ outputs.ravel()
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-6)
    assert replay(imported, ["h2o"], [50], store=False)[0].exactness == "E2"


def test_rope_is_found_from_queries_before_and_after(imported: Trace) -> None:
    data = imported.layer_data(1)
    extra = extra_signals(imported, data.spec, 0, data.q, frozenset({"q_prerope"}))
    assert extra.inv_freq is not None
    assert extra.q_prerope is not None
    assert extra.wo is None
    np.testing.assert_allclose(extra.inv_freq, LLAMA, rtol=0, atol=1e-7)
    assert data.q is not None
    turned = rotate(extra.q_prerope, np.arange(216), extra.inv_freq)
    np.testing.assert_allclose(turned, data.q, atol=2e-5)


def test_queries_are_turned_back_where_only_theta_is_known(synthetic_trace: SyntheticTrace) -> None:
    trace = synthetic_trace(specs=[LayerSpec(0, 4, 2, 16, 16, 0.25, rope_theta=10000.0)])
    data = trace.layer_data(0)
    extra = extra_signals(trace, data.spec, 0, data.q, frozenset({"q_prerope"}))
    assert data.q is not None
    assert extra.q_prerope is not None
    assert extra.inv_freq is not None
    np.testing.assert_allclose(extra.inv_freq, LLAMA)
    np.testing.assert_array_equal(extra.q_prerope[0], data.q[0])
    np.testing.assert_allclose(fitted_frequencies(data.q, extra.q_prerope), LLAMA, atol=1e-6)


def test_what_a_trace_lacks_is_said(synthetic_trace: SyntheticTrace, tmp_path: Path) -> None:
    trace = synthetic_trace()
    assert set(missing(trace, trace.layers)) == {"q_prerope", "wo", "score"}
    with pytest.raises(InputError, match=r"declares cannot be replayed.*layer 0 has no rotary pos"):
        replay(trace, [Declares()], [5])
