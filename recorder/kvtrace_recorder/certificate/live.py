"""The policy run live: decided from the evicting run's own q, k and v.

A live decision depends on the decisions before it, so no single pass can make them all. But run
the model under the sets of the replay, replay the policy on what that run computed, run it under
those sets, and so on: each pass is right about at least one decision more than the last, and
where a pass gives the sets it was run under, they are those of the live run, every one.

The replaying itself is the `replay` verb's business, on a trace of the enforced run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvtrace.model import Layer, Request
from kvtrace.trace import Trace
from kvtrace.writer import LayerSpec, TraceWriter
from kvtrace_recorder.certificate import replayed as replay_verb
from kvtrace_recorder.certificate.enforce import as_tensors
from kvtrace_recorder.certificate.forward import EnforcedRun, new_rows, teacher_forced
from kvtrace_recorder.certificate.replayed import Reads
from kvtrace_recorder.certificate.result import Live
from kvtrace_recorder.certificate.sets import KeptSets, events_apart, first_measured
from kvtrace_recorder.lse import KeyHistory, row_lse


@dataclass
class Captured:
    """q, k and v of the rows that an enforced run computed, by layer and kind."""

    parts: dict[tuple[int, str], list[NDArray[np.float32]]] = field(default_factory=dict)

    def see(self, layer: int, call: Any) -> None:
        """Keep the operands of a call's rows."""
        rows = call.q.shape[2]
        for kind, values in (("q", call.q), ("k", call.k), ("v", call.v)):
            self.parts.setdefault((layer, kind), []).append(new_rows(values, rows)[0])


def obstacle(trace: Trace, request: Request, replay: Mapping[str, Any]) -> str | None:
    """Why a replay's policy cannot be run live on the tokens of a trace; None where it can."""
    policy = replay["policy"]
    if not replay["evictions"] and not (replay["selects"] or replay["exactness"] == "E2s"):
        return "it evicts nothing, so a live run is the model's own"
    if replay["rerotate"] and replay["exactness"] in ("E0", "E1"):
        return "it decides by position or once after the prompt, so a live run keeps the same"
    if replay["rerotate"]:
        return "it is re-rotated, and a live policy would decide from the attention of that"
    if policy.partition(":")[0] in ("oracle", "full"):
        return f"{policy} decides nothing, or from what no running cache knows"
    if replay["decide_when"] == "chunk":
        return "it cut by the recorded chunks; a live run is replayed as one (replay chunk=N)"
    held, layers = trace.holdings(request.request), trace.layers_of(request.request)
    if not held.has_all_queries or any(set("qkv") - held.layers[s.layer] for s in layers):
        return "the trace does not hold q, k and v of every row"
    if any(spec.is_part for spec in layers):
        return "the trace holds some KV heads only"
    if any(spec.has_sinks or spec.position_bias is not None for spec in layers):
        return "the model's learned sinks or biases are not in the operands of its attention"
    return None


def run_live(
    trace: Trace,
    request: Request,
    replay: Mapping[str, Any],
    model: Any,
    ids: torch.Tensor,
    layers: Mapping[int, Layer],
    replayed: NDArray[np.int32],
    reads: Reads | None,
    passes: int,
) -> Live:
    """Run a replay's policy live; see the module.

    Parameters
    ----------
    trace, request, replay
        What was recorded, which of its requests, and the row of table `replays`.
    model, ids, layers
        As `teacher_forced` takes them.
    replayed : int32 [token, layer, kv_head]
        `evicted_at` of the replay.
    reads : Reads, optional
        What queries read by it that choose it.
    passes : int
        At most so many.

    Raises
    ------
    InputError
        Where the enforced run cannot be replayed, with the reason.
    """
    under = KeptSets(replayed, reads)
    first_row = first_measured(replayed) if reads is None else reads.first_row
    with tempfile.TemporaryDirectory(prefix="kvtrace-live-") as folder:
        for number in range(1, passes + 1):
            captured = Captured()
            hidden = as_tensors(under.evicted_at, model)
            run = EnforcedRun(hidden, first_row, captured.see, reads=under.reads)
            teacher_forced(model, ids, layers, [run])
            path = Path(folder) / "enforced.kvtrace"
            _write(path, trace, request, captured, first_row)
            found = KeptSets(
                replay_verb.evicted_at(path, replay)[:, : replayed.shape[1], : replayed.shape[2]],
                None
                if reads is None
                else replay_verb.reads(path, replay, 0, trace.layers_of(request.request)),
            )
            changed = found.first_change(under)
            if changed is None or number == passes:
                break
            under = found
    kl_mean = float(run.steps["kl"].mean())
    events = events_apart(KeptSets(replayed, reads), found, changed)
    jaccard = float(np.mean(events["jaccard"])) if len(events["jaccard"]) else 1.0
    return Live(number, changed is None, kl_mean, jaccard, events, found.evicted_at)


def _write(path: Path, trace: Trace, request: Request, captured: Captured, first: int) -> None:
    """Make a trace of an enforced run: the recorded rows before `first`, its own from there."""
    dtype = trace.table("runs")["dtype"][0].as_py()
    models = {row["model"]: row for row in trace.table("models").to_pylist()}
    model = models[request.model]
    with TraceWriter(path, source="recorded", dtype=dtype, force=True) as writer:
        of_model = {name: model[name] for name in ("name", "num_layers", "hidden_size", "dtype")}
        number = writer.add_model(**of_model)
        layers = trace.layers_of(request.request)
        writer.add_layers(number, [_spec(layer) for layer in layers])
        if "wo" in trace.signals:
            writer.put_static("wo", trace.static("wo"), "layer,hidden,q_head_dim")
        _begin(writer, number, request)
        for layer in layers:
            rows = _rows(trace, request, layer, captured, first, dtype)
            writer.append_layer(number, layer.layer, **rows)


def _spec(layer: Layer) -> LayerSpec:
    names = LayerSpec.__dataclass_fields__
    return LayerSpec(**{name: getattr(layer, name) for name in names})


def _rows(
    trace: Trace, request: Request, layer: Layer, captured: Captured, first: int, dtype: str
) -> dict[str, NDArray[Any]]:
    data = trace.layer_data(layer.layer, request.request)
    rows: dict[str, NDArray[Any]] = {}
    for kind in ("q", "k", "v"):
        before = getattr(data, kind)[:first]
        own = captured.parts.get((layer.layer, kind), [])
        rows[kind] = np.concatenate([before, *own]).astype(dtype)
    history = KeyHistory()
    history.extend(rows["k"])
    rows["lse"] = row_lse(rows["q"], history, np.arange(len(rows["q"])), _spec(layer))
    return rows


def _begin(writer: TraceWriter, model: int, request: Request) -> None:
    """Begin the one step that holds all rows."""
    tokens = request.tokens
    at = np.arange(tokens)
    prompt = [min(request.prompt_tokens, tokens)]
    writer.append(
        "requests", {"request": [0], "run": [0], "model": [model], "prompt_tokens": prompt}
    )
    writer.append("steps", {"step": [0], "run": [0], "model": [model], "phase": ["mixed"]})
    zeros = np.zeros(tokens, np.int64)
    writer.append("tokens", {"request": zeros, "position": at, "row": at})
    writer.append(
        "rows",
        {
            "row": at,
            "step": zeros,
            "request": zeros,
            "position": at,
            "has_query": np.ones(tokens, np.bool_),
        },
    )
