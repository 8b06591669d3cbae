"""What a replay gathers of all its pairs, request by request and layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace.cached import cached_layers
from kvtrace.errors import InputError
from kvtrace.model import Request
from kvtrace.rope import Rope
from kvtrace.trace import Trace
from kvtrace_viewer.replay.block import Head
from kvtrace_viewer.replay.bounds import MovingBounds
from kvtrace_viewer.replay.engine import HeadReplay, Run, replay_layer
from kvtrace_viewer.replay.gaps import (
    first_holdings,
    left_out_rows,
    lost_rows,
    whole_tokens,
    without_query,
)
from kvtrace_viewer.replay.heads import as_held, heads_of
from kvtrace_viewer.replay.kernels import NEVER
from kvtrace_viewer.replay.measure import Measures
from kvtrace_viewer.replay.pairs import Pair
from kvtrace_viewer.replay.reads import Reads, layer_reads
from kvtrace_viewer.replay.replayable import layers_held
from kvtrace_viewer.replay.rerotation import Rerotated, measure_rerotated
from kvtrace_viewer.replay.signals import extra_signals
from kvtrace_viewer.replay.totals import HeadTotals, StepTotals
from kvtrace_viewer.replay.when import When


@dataclass
class Collected:
    """The results of all pairs so far; `summary.summed_up` makes results of them."""

    trace: Trace
    requests: list[Request]
    pairs: list[Pair]
    measures: Measures
    progress: Callable[[float], None]
    ropes: dict[int, Rope] | None
    done: int = 0
    totals: dict[tuple[int, int], HeadTotals] = field(default_factory=dict)
    rerotated: dict[tuple[int, int], Rerotated] = field(default_factory=dict)
    steps: dict[int, StepTotals] = field(default_factory=dict)
    rhythms: dict[tuple[When, int], When] = field(default_factory=dict)
    replayed: dict[int, tuple[Request, NDArray[np.int64]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.left_out = lost_rows(self.trace)
        self.held = {r.request: self.trace.holdings(r.request) for r in self.requests}
        self.layers = layers_held(list(self.held.values()))
        self.kv_heads = {
            layer.layer: layer.kv_head_numbers
            for layer in cached_layers(self.trace, list(self.held))
            if layer.layer in self.layers
        }
        heads = 1 + max(max(numbers) for numbers in self.kv_heads.values())
        self.places = self.trace.places()
        shape = (self.places.rows, max(self.kv_heads) + 1, heads)
        self.evicted_at = np.full((len(self.pairs), *shape), -1, dtype=np.int32)
        self.moving = MovingBounds(len(self.pairs))
        self.reads: list[dict[int, dict[int, Reads]]] = [{} for _ in self.pairs]

    def add(self, recorded: Request, pool: Executor, of: int) -> None:
        """Replay one request; `of` are the tokens of all."""
        request = self._whole(recorded)
        rows = self.places.of(self.trace.request_rows(request.request))[: request.tokens]
        self.replayed[request.request] = (request, rows)
        unmeasured = np.zeros(request.tokens, np.bool_)
        steps = StepTotals.zeros(len(self.pairs), len(rows))
        self.steps[request.request] = steps
        of_model = [layer.layer for layer in cached_layers(self.trace, [request.request])]
        layers = [layer for layer in of_model if layer in self.layers]

        def passed(count: int) -> None:
            self.done += count
            self.progress(self.done / (of * len(layers)))

        num_layers = self.num_layers(request.model, of_model)
        runs = self.runs(request)
        surveys = self.survey(runs, request, layers, num_layers)
        for layer in layers:
            heads = [
                replace(head, surveys=surveys) for head in self.heads(layer, request, num_layers)
            ]
            unmeasured |= without_query(heads)
            self._add_layer(request.request, heads, runs, rows, steps, pool, passed)
        self.moving.end_request()
        held = self.held[request.request]
        self.left_out += left_out_rows(recorded, request.tokens, unmeasured, held)

    def _add_layer(
        self,
        request: int,
        heads: list[Head],
        runs: list[Run],
        rows: NDArray[np.int64],
        steps: StepTotals,
        pool: Executor,
        passed: Callable[[int], None],
    ) -> None:
        """Replay one layer of a request; what its caches took is free again afterwards."""
        layer = heads[0].layer
        replays = replay_layer(heads, runs, self.measures, pool, passed)
        for replayed in replays:
            self._collect(replayed, rows, steps)
        self.moving.add(layer, replays)
        for p, reads in layer_reads(replays).items():
            self.reads[p].setdefault(request, {})[layer] = reads
        if self.ropes is None:
            return
        rope = self.ropes[layer]
        measured = pool.map(lambda replayed: measure_rerotated(replayed, rope), replays)
        for head, found in zip(heads, measured, strict=True):
            at = (layer, head.kv_head)
            self.rerotated[at] = self.rerotated[at] + found if at in self.rerotated else found

    def _whole(self, request: Request) -> Request:
        """The request as far as its rows can be replayed."""
        tokens = whole_tokens(self.trace, request, self.layers)
        if not tokens:
            raise InputError(
                f"request {request.request} of {self.trace.path} has no keys at its first token in "
                "some layer; all were expected; see the gaps in `kvtrace info`"
            )
        self.held[request.request] = first_holdings(self.held[request.request], tokens)
        return replace(request, tokens=tokens)

    def runs(self, request: Request) -> list[Run]:
        """Neighbouring pairs of one policy share its state: one run."""
        runs: list[Run] = []
        previous = ""
        for pair in self.pairs:
            if pair.spec != previous:
                runs.append(Run(pair.policy, self.rhythm(pair, request), []))
            runs[-1].budgets.append(pair.budget)
            previous = pair.spec
        return runs

    def rhythm(self, pair: Pair, request: Request) -> When:
        """When a pair decides in one request."""
        at = (pair.when, request.request)
        if at not in self.rhythms:
            self.rhythms[at] = pair.when.of(self.trace, request.request)
        return self.rhythms[at]

    def heads(self, layer: int, request: Request, num_layers: int) -> list[Head]:
        """The KV heads of one layer, with the signals that some policy declares."""
        data = as_held(self.trace.layer_data(layer, request.request), self.held[request.request])
        wanted = frozenset[str]().union(*(pair.policy.signals for pair in self.pairs))
        extra = extra_signals(self.trace, data.spec, request.request, data.q, wanted)
        return heads_of(data, request, num_layers, extra)

    def survey(
        self, runs: list[Run], request: Request, layers: list[int], num_layers: int
    ) -> dict[str, dict[int, Any]]:
        """What policies that look at every layer first find, by policy and layer."""
        surveyors = [run for run in runs if run.policy.surveys]
        found: dict[str, dict[int, Any]] = {run.policy.spec: {} for run in surveyors}
        for layer in layers if surveyors else ():
            heads = self.heads(layer, request, num_layers)
            for run in surveyors:
                cuts = run.when.cuts(heads[0].tokens, heads[0].prompt_tokens)
                found[run.policy.spec][layer] = run.policy.survey(heads, cuts)
        return found

    def num_layers(self, model: int, recorded: list[int]) -> int:
        """Layers of the model that attend, also those that were not asked for."""
        if self.trace.selection.get("layers") is None:
            return len(recorded)
        models = self.trace.table("models").to_pylist()
        count = next(row["num_layers"] for row in models if row["model"] == model)
        return max(count or 0, recorded[-1] + 1)

    def _collect(self, head: HeadReplay, rows: NDArray[np.int64], steps: StepTotals) -> None:
        where = (head.head.layer, head.head.kv_head)
        total = self.totals.setdefault(where, HeadTotals.zeros(len(self.pairs)))
        total.add(head.summarise(steps))
        evicted = np.where(head.evicted_at == NEVER, -1, head.evicted_at)
        self.evicted_at[:, rows, where[0], where[1]] = evicted

    @cached_property
    def total(self) -> HeadTotals:
        """All heads together, once every request was added."""
        total = HeadTotals.zeros(len(self.pairs))
        for head in self.totals.values():
            total.add(head)
        return total
