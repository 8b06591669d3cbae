"""The policy run live: decided from the evicting run's own q, k and v.

A live decision depends on the decisions before it, so no single pass can make them all. But run
the model under the sets of the replay, replay the policy on what that run computed, run it under
those sets, and so on: each pass is right about at least one decision more than the last, and
where a pass gives the sets it was run under, they are those of the live run, every one.

The replaying itself is the `replay` verb's business, on a trace of the enforced run.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import kvtrace
import kvtrace.cli
from kvtrace.errors import InputError
from kvtrace.model import Layer, Request
from kvtrace.trace import Trace
from kvtrace.writer import LayerSpec, TraceWriter
from kvtrace_recorder.certificate.enforce import as_tensors
from kvtrace_recorder.certificate.forward import EnforcedRun, new_rows, teacher_forced
from kvtrace_recorder.certificate.result import Columns, Live
from kvtrace_recorder.lse import KeyHistory, row_lse

Evicted = NDArray[np.int32]


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
    replayed: Evicted,
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
    passes : int
        At most so many.

    Raises
    ------
    InputError
        Where the enforced run cannot be replayed, with the reason.
    """
    under, first_row = replayed, first_measured(replayed)
    with tempfile.TemporaryDirectory(prefix="kvtrace-live-") as folder:
        for number in range(1, passes + 1):
            captured = Captured()
            run = EnforcedRun(as_tensors(under, model), first_row, captured.see)
            teacher_forced(model, ids, layers, [run])
            path = Path(folder) / "enforced.kvtrace"
            _write(path, trace, request, captured, first_row)
            found = _replay(path, replay)[:, : under.shape[1], : under.shape[2]]
            apart = found != under
            if not apart.any() or number == passes:
                break
            under = found
    kl_mean = float(run.steps["kl"].mean())
    # From the first decision on that the last pass changed, nothing is settled but it itself.
    changed = np.minimum(_last(found), _last(under))[apart]
    settled_to = int(changed.min()) if apart.any() else len(ids[0])
    events = _events(replayed, found, settled_to)
    jaccard = float(np.mean(events["jaccard"])) if len(events["jaccard"]) else 1.0
    return Live(number, not apart.any(), kl_mean, jaccard, events, found)


def first_measured(evicted_at: Evicted) -> int:
    """The first row that misses a key; the number of tokens where none does."""
    gone = evicted_at[evicted_at >= 0]
    return int(gone.min()) + 1 if len(gone) else len(evicted_at)


def _last(evicted_at: Evicted) -> Evicted:
    return np.where(evicted_at < 0, len(evicted_at), evicted_at)


def _events(replayed: Evicted, live: Evicted, settled_to: int) -> Columns:
    """Columns of table `certificate_events`: Jaccard index of the held sets after each decision."""
    tokens, num_layers, num_heads = replayed.shape
    a, b = _last(replayed), _last(live)
    rows = np.unique(np.concatenate([a[a < tokens], b[b < tokens]]))
    present = np.arange(1, tokens + 1)
    found = np.ones((len(rows), num_layers, num_heads))
    for layer in range(num_layers):
        for head in range(num_heads):
            both, either = (
                present - np.bincount(x, minlength=tokens + 1)[:tokens].cumsum()
                for x in (
                    np.minimum(a[:, layer, head], b[:, layer, head]),
                    np.maximum(a[:, layer, head], b[:, layer, head]),
                )
            )
            found[:, layer, head] = both[rows] / np.maximum(either[rows], 1)
    return {
        "position": np.repeat(rows, num_layers),
        "layer": np.tile(np.arange(num_layers), len(rows)),
        "jaccard": found.mean(axis=2).ravel(),
        "jaccard_worst": found.min(axis=2).ravel(),
        "is_exact": np.repeat(rows <= settled_to, num_layers),
    }


def _replay(path: Path, replay: Mapping[str, Any]) -> Evicted:
    """`evicted_at` of the same policy on another trace, by the verb that makes replays."""
    said = io.StringIO()
    arguments = [str(path), "--policy", replay["policy"], "--budget", replay["budget"]]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        status = kvtrace.cli.main(["replay", *arguments, "--when", replay["decide_when"]])
    if status:
        raise InputError(said.getvalue().strip().removeprefix("error: "))
    trace = kvtrace.open(path)
    array = trace.replay(trace.replays()["replay"][0].as_py()).array("evicted_at")
    return np.asarray(array.read(0, trace.rows), np.int32)


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
