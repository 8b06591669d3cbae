"""`replay`: a trace through policies and budgets, in one pass."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace.cached import cached_layers, cached_requests
from kvtrace.errors import InputError
from kvtrace.model import Request
from kvtrace.rope import Rope
from kvtrace.trace import Trace
from kvtrace_viewer.replay.amounts import Budget, parse_budget, parse_budgets
from kvtrace_viewer.replay.block import Head
from kvtrace_viewer.replay.bounds import MovingBounds
from kvtrace_viewer.replay.engine import HeadReplay, Run, replay_layer, workers
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
from kvtrace_viewer.replay.plugins import mistakes_explained
from kvtrace_viewer.replay.policy import Policy
from kvtrace_viewer.replay.reads import Reads, layer_reads
from kvtrace_viewer.replay.replayable import check, layers_held, left_out
from kvtrace_viewer.replay.rerotation import (
    RENUMBERED,
    Rerotated,
    known_ropes,
    mean_overlap_and_error,
    measure_rerotated,
)
from kvtrace_viewer.replay.result import ReplayedRequest, Result
from kvtrace_viewer.replay.signals import extra_signals
from kvtrace_viewer.replay.spec import parse_policy
from kvtrace_viewer.replay.storage import store_result
from kvtrace_viewer.replay.totals import HeadTotals, StepTotals, as_mean
from kvtrace_viewer.replay.when import When, parse_when


@dataclass(frozen=True)
class Pair:
    """One policy at one budget: a column of everything."""

    spec: str
    policy: Policy
    budget: Budget
    when: When

    @property
    def id(self) -> str:
        """Name of the result: `h2o-25pct-step`."""
        text = f"{self.spec}-{self.budget}-{self.when}".replace("%", "pct")
        return re.sub(r"[^A-Za-z0-9_.=-]", ".", text)


def replay(
    trace: Trace,
    policies: Sequence[str | Policy],
    budgets: Sequence[str | int | Budget],
    when: str | When | None = None,
    requests: Sequence[int] | None = None,
    store: bool = True,
    progress: Callable[[float], None] | None = None,
    measures: Measures | None = None,
    rerotate: bool = False,
) -> list[Result]:
    """Replay a trace through every policy at every budget.

    Parameters
    ----------
    trace : Trace
        With k of every row, the queries that the policies and the measured rows need, and v for
        the output error.
    policies : sequence of str or Policy
        `name[:key=value,...]`, or policy objects.
    budgets : sequence of str, int or Budget
        Tokens (`128`), a percentage of the tokens present at each decision (`25%`), or a range
        of either (`5%..100%/5%`).
    when : str, optional
        prefill, step, every=N, stream, chunk=N or chunk (the prompt's own chunks as recorded);
        what each policy's paper does where left out.
    requests : sequence of int, optional
        All where left out, of encoder-decoders those of the decoder.
    store : bool
        Keep each result under the trace's `replays/`.
    progress : callable, optional
        Told the share done, 0 to 1.
    measures : Measures, optional
        Thresholds of what is measured.
    rerotate : bool
        Renumber kept tokens by their place in the cache, and re-rotate their keys (see
        `rerotation`).

    Returns
    -------
    list of Result
        Policy by policy, each at every budget; a pair given twice counts once.

    Raises
    ------
    InputError
        For an unknown policy, parameter, budget, rhythm or request, an empty trace, and a
        trace without what a policy needs or, to be re-rotated, without rotary positions.

    Examples
    --------
    >>> replay(trace, ["h2o", "streaming_llm:sinks=4"], ["25%", 128])      # doctest: +SKIP
    """
    pairs = _pairs(policies, budgets, when)
    chosen = _requests(trace, requests)
    check(trace, [r.request for r in chosen], [(pair.policy, pair.when) for pair in pairs])
    turns = (
        known_ropes(trace, [r.request for r in chosen], [p.policy for p in pairs])
        if rerotate
        else None
    )
    tell = progress or (lambda share: None)
    work = _Work(trace, chosen, pairs, measures or Measures(), tell, turns)
    with workers() as pool, mistakes_explained():
        for request in chosen:
            work.add(request, pool, of=sum(r.tokens for r in chosen))
    results = [work.result(p) for p in range(len(pairs))]
    if store:
        for result in results:
            store_result(result, trace.replay_directory())
    return results


def _pairs(
    policies: Sequence[str | Policy],
    budgets: Sequence[str | int | Budget],
    when: str | When | None,
) -> list[Pair]:
    limits = list(dict.fromkeys(one for budget in budgets for one in _budgets(budget)))
    found: dict[str, Pair] = {}
    for text in policies:
        policy = parse_policy(text)
        spec = policy.spec if isinstance(text, Policy) else text
        rhythm = parse_when(when or policy.default_when)
        for budget in limits:
            pair = Pair(spec, policy, budget, rhythm)
            found.setdefault(pair.id, pair)
    if not found:
        raise InputError(
            f"{len(policies)} policies and {len(budgets)} budgets were given; at least one of "
            "each was expected; name a policy and a budget"
        )
    return list(found.values())


def _budgets(given: str | int | Budget) -> list[Budget]:
    return parse_budgets(given) if isinstance(given, str) else [parse_budget(given)]


def _requests(trace: Trace, numbers: Sequence[int] | None) -> list[Request]:
    known = {request.request: request for request in trace.requests()}
    for number in numbers or ():
        if number not in known:
            raise InputError(
                f"request {number} was not found in {trace.path}; it has "
                f"{', '.join(map(str, list(known)[:8]))}; choose one of them"
            )
    return [known[n] for n in dict.fromkeys(numbers or cached_requests(trace))]


@dataclass
class _Work:
    """Collects the results of all pairs, request by request and layer by layer."""

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

    def result(self, p: int) -> Result:
        """Make the result of pair `p`."""
        pair, total = self.pairs[p], self.total
        masses = int(total.masses[p])
        overlap, error = mean_overlap_and_error(self.rerotated.values(), p)
        if self.ropes is None and total.errors[p]:
            error = float(total.error[p] / total.errors[p])
        return Result(
            id=pair.id + ("-rerotated" if self.ropes is not None else "") + self._chosen(),
            policy=pair.spec,
            parameters=pair.policy.parameters(),
            budget=str(pair.budget),
            when=str(pair.when),
            exactness=pair.policy.exactness(pair.when),
            tokens=sum(len(rows) for _, rows in self.replayed.values()),
            measured_rows=sum(int((s.masses[p] > 0).sum()) for s in self.steps.values()),
            hits=int(total.hits[p]),
            misses=int(total.misses[p]),
            evictions=int(total.evictions[p]),
            sinks=total.sinks,
            retained_sinks=int(total.retained_sinks[p]),
            retained_mass=float(total.mass[p] / masses) if masses else None,
            mass_p5=total.p5(p),
            mass_worst=float(total.worst[p]) if masses else None,
            rerotate=self.ropes is not None,
            overlap=overlap,
            output_error=error,
            output_rows=int(total.error_rows[p]) // len(self.totals),
            ties=int(total.ties[p]),
            bound=total.mean_bound(p),
            bound_layer=as_mean(sum(x[p] for x in self.moving.of_layers.values()), masses),
            bound_model=as_mean(self.moving.of_model[p], masses),
            bound_scope=None if self.moving.beyond[p] else pair.policy.bound_scope,
            left_out=tuple(self.left_out),
            notes=self._notes(pair),
            evicted_at=self.evicted_at[p],
            reads=self.reads[p],
            selects=pair.policy.selects,
            places=self.places,
            steps=self._steps(p),
            heads=self._heads(p),
            requests={
                number: ReplayedRequest(rows, _last_cut(self.rhythm(pair, request), request))
                for number, (request, rows) in self.replayed.items()
            },
            kv_heads=self.kv_heads,
        )

    def _chosen(self) -> str:
        """What sets a replay of some requests apart from one of all."""
        if set(self.replayed) == set(cached_requests(self.trace)):
            return ""
        return "-request=" + ".".join(map(str, self.replayed))

    def _notes(self, pair: Pair) -> tuple[str, ...]:
        found = left_out(self.trace, list(self.held))
        found += map(str, self.left_out)
        if self.ropes is not None:
            found.append(RENUMBERED)
        present = max(len(rows) for _, rows in self.replayed.values())
        limit = pair.budget.limits(np.array([present]))
        last = max(int(pair.policy.recent.of(limit)[0]), pair.policy.least_recent)
        protected = pair.policy.sinks + last
        if protected > limit[0]:
            found.append(
                f"{pair.spec} at {pair.budget}: {protected} protected tokens do not fit; the first "
                "were protected before the last, up to the budget"
            )
        elif self._loses_sinks(pair):
            found.append(
                f"{pair.spec}, --when {pair.when}: a percentage of its first tokens is fewer than"
                f" its {pair.policy.sinks} sinks, so that some go at once and for good; a budget"
                " in tokens, or --when step, keeps them"
            )
        return tuple(found)

    def _loses_sinks(self, pair: Pair) -> bool:
        """Whether a cut comes while the budget is smaller than the protection of first tokens."""
        for request, _ in self.replayed.values():
            present = self.rhythm(pair, request).cuts(request.tokens, request.prompt_tokens) + 1
            protected = np.minimum(present, pair.policy.sinks)
            if bool((pair.budget.limits(present) < protected).any()):
                return True
        return False

    def _steps(self, p: int) -> dict[str, NDArray[np.float64] | NDArray[np.int64]]:
        parts = []
        for number, s in self.steps.items():
            at = np.flatnonzero(s.masses[p])
            mass = s.mass[p, at] / s.masses[p, at]
            counts = (s.hits[p, at], s.misses[p, at], s.evictions[p, at], s.held[p, at])
            parts.append((np.full(len(at), number), at, mass, s.worst[p, at], *counts))
        names = ["request", "position", "mass", "mass_worst", "hits", "misses", "evictions", "held"]
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        return dict(zip(names, columns, strict=True))

    def _heads(self, p: int) -> dict[str, list[object]]:
        rows: list[dict[str, object]] = []
        masses: dict[int, int] = {}
        for (layer, _), t in self.totals.items():
            masses[layer] = masses.get(layer, 0) + int(t.masses[p])
        for (layer, kv_head), t in self.totals.items():
            measured = t.masses[p] > 0
            error = t.error[p] / t.errors[p] if t.errors[p] else None
            overlap = None
            if self.ropes is not None:
                overlap, error = self.rerotated[layer, kv_head].means(p)
            rows.append(
                {
                    "layer": layer,
                    "kv_head": kv_head,
                    "mass": t.mass[p] / t.masses[p] if measured else None,
                    "mass_p5": t.p5(p),
                    "mass_worst": float(t.worst[p]) if measured else None,
                    "hits": int(t.hits[p]),
                    "misses": int(t.misses[p]),
                    "evictions": int(t.evictions[p]),
                    "overlap": overlap,
                    "output_error": error,
                    "ties": int(t.ties[p]),
                    "bound": t.mean_bound(p),
                    "bound_layer": as_mean(self.moving.of_layers[layer][p], masses[layer]),
                }
            )
        return {name: [row[name] for row in rows] for name in rows[0]}


def _last_cut(when: When, request: Request) -> int:
    cuts = when.cuts(request.tokens, min(request.prompt_tokens, request.tokens))
    return int(cuts[-1]) if len(cuts) else request.tokens - 1
