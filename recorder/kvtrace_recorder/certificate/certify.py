"""`certify`: run the model under the kept sets of a replay, and say what that changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvtrace.cached import cached_requests
from kvtrace.errors import InputError
from kvtrace.model import Layer, Request
from kvtrace.ranks import NUMBERS_PER_RANK
from kvtrace.trace import Trace
from kvtrace_recorder.certificate import live, replayed
from kvtrace_recorder.certificate.enforce import as_tensors, attention_modules, known_ropes
from kvtrace_recorder.certificate.forward import EnforcedRun, KeyCheck, teacher_forced
from kvtrace_recorder.certificate.generation import generate_both
from kvtrace_recorder.certificate.replayed import Reads
from kvtrace_recorder.certificate.result import Certificate, Live, store, summary

KEY_ERROR = 0.05
"""Further than this a model's keys are from another model, or from other tokens."""
CHECKED_LAYERS = 4
PASSES = 8
GENERATED = 64


@dataclass(frozen=True)
class Options:
    """What a certificate has beside the comparison.

    Attributes
    ----------
    passes : int
        Passes at most to run the policy live; 0: it is not.
    generated : int
        Tokens generated at most; 0: none.
    """

    passes: int = PASSES
    generated: int = GENERATED


def certify(
    trace: Trace,
    replays: list[str],
    model: Any,
    tokenizer: Any = None,
    options: Options | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> list[Certificate]:
    """Certify stored replays, and keep the certificates beside them.

    Parameters
    ----------
    trace : Trace
        A decoder's, with the token ids.
    replays : list of str
        Names of stored results.
    model : transformers.PreTrainedModel
        The model that was recorded.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Writes generated texts.
    options : Options, optional
        What else is run.
    progress : callable, optional
        Told the share done, 0 to 1.

    Returns
    -------
    list of Certificate
        Replay by replay, each for every request that it replayed and that rows follow its first
        cut in.

    Raises
    ------
    InputError
        For a replay that is unknown or cannot be enforced, a model that is not the recorded one,
        and where no row follows the first cut.
    """
    options = options or Options()
    rows = {row["replay"]: row for row in trace.replays().to_pylist()}
    work = [_Work.of(trace, rows, name) for name in dict.fromkeys(replays)]
    by_request = {one: [w for w in work if one in w.requests] for one in _requests(trace)}
    todo = {request: some for request, some in by_request.items() if some}
    found: dict[str, list[Certificate]] = {one.name: [] for one in work}
    model.eval()
    for done, (number, some) in enumerate(todo.items()):
        request = next(one for one in trace.requests() if one.request == number)

        def tell(share: float, done: int = done) -> None:
            progress((done + share) / len(todo))

        certified = _certify_request(trace, request, some, model, tokenizer, options, tell)
        for certificate in certified:
            found[certificate.replay].append(certificate)
    for certificates in found.values():
        store(trace, certificates)
    return [certificate for certificates in found.values() for certificate in certificates]


@dataclass(frozen=True, eq=False)
class _Work:
    """A replay to certify.

    Attributes
    ----------
    row : mapping
        Its row of table `replays`.
    evicted_at : int32 [row, layer, kv_head]
    requests : dict of int to int
        The first measured row of each request.
    last : dict of int to int
        The last: a replay ends before a gap of the trace.
    """

    name: str
    row: Mapping[str, Any]
    evicted_at: NDArray[np.int32]
    requests: dict[int, int]
    last: dict[int, int]

    @classmethod
    def of(cls, trace: Trace, rows: Mapping[str, Mapping[str, Any]], name: str) -> _Work:
        """Read a stored replay.

        Raises
        ------
        InputError
            Where there is none of this name, or it cannot be enforced.
        """
        stored = trace.replay(name)
        steps = stored.table("replay_steps")
        measured = zip(steps["request"].to_pylist(), steps["position"].to_pylist(), strict=True)
        requests: dict[int, int] = {}
        last: dict[int, int] = {}
        for request, position in measured:
            requests[request] = min(position, requests.get(request, position))
            last[request] = max(position, last.get(request, position))
        if not requests:
            raise InputError(
                f"no row of {name} follows its first cut; a certificate compares those rows;"
                " replay a trace with decoded tokens, or with --when stream"
            )
        array = stored.array("evicted_at")
        return cls(name, rows[name], np.asarray(array.read(0, array.shape[0])), requests, last)

    def reads(self, trace: Trace, request: Request, layers: list[Layer]) -> Reads | None:
        """What queries read, where each chooses it: found anew, as it is not stored."""
        if not (self.row["selects"] or self.row["exactness"] == "E2s"):
            return None
        return replayed.reads(trace.path, self.row, request.request, layers)

    def of_request(self, trace: Trace, request: Request) -> NDArray[np.int32]:
        """`evicted_at [token, layer, kv_head]` of a request.

        Raises
        ------
        InputError
            Where the request has grown since it was replayed.
        """
        places = trace.replay_places(self.name)
        at = places.of(trace.request_rows(request.request))
        rank = request.request // NUMBERS_PER_RANK
        if at.max() >= places.first[rank] + places.counts[rank]:
            raise InputError(
                f"request {request.request} of {trace.path} has grown since {self.name} was made;"
                " a certificate is of all its tokens; replay it again"
            )
        return self.evicted_at[at]


def _requests(trace: Trace) -> list[int]:
    for spec in trace.layers:
        if spec.attention_kind in ("cross", "bidirectional"):
            raise InputError(
                f"layer {spec.layer} of {trace.path} has {spec.attention_kind} attention; only"
                " decoders are certified; choose a decoder's trace"
            )
    return cached_requests(trace)


def _certify_request(
    trace: Trace,
    request: Request,
    work: list[_Work],
    model: Any,
    tokenizer: Any,
    options: Options,
    progress: Callable[[float], None],
) -> list[Certificate]:
    specs = trace.layers_of(request.request)
    layers = attention_modules(model, specs)
    request = replace(request, tokens=1 + max(one.last[request.request] for one in work))
    ids = _token_ids(trace, request).to(model.device)
    check = _key_check(trace, request, specs)
    evicted_at = {one.name: one.of_request(trace, request)[: request.tokens] for one in work}
    runs = {
        one.name: EnforcedRun(
            as_tensors(evicted_at[one.name], model),
            one.requests[request.request],
            ropes=known_ropes(trace, specs) if one.row["rerotate"] else None,
            reads=one.reads(trace, request, specs),
        )
        for one in work
    }
    share = 0.5 if options.passes or options.generated else 1.0
    teacher_forced(
        model, ids, layers, list(runs.values()), check.see, lambda x: progress(x * share)
    )
    if check.error > KEY_ERROR:
        raise InputError(
            f"the keys that the model computes are {check.error:.0%} off the recorded ones; within"
            f" {KEY_ERROR:.0%} was expected; give the model that was recorded with --model"
        )
    found = []
    for done, one in enumerate(work, start=1):
        gone = evicted_at[one.name]
        lived, reason = _live(
            trace, request, one, model, ids, layers, gone, runs[one.name].reads, options
        )
        generation = None
        count = min(options.generated, request.tokens - request.prompt_tokens)
        if count > 0:
            prompt = ids[:, : request.prompt_tokens]
            generation = generate_both(model, tokenizer, prompt, layers, runs[one.name], count)
        found.append(
            Certificate(
                replay=one.name,
                request=request.request,
                model=str(getattr(model, "name_or_path", "") or type(model).__name__),
                key_error=check.error,
                generation=generation,
                live=lived,
                live_reason=reason,
                **summary(runs[one.name].steps),
            )
        )
        progress(share + (1 - share) * done / len(work))
    return found


def _live(
    trace: Trace,
    request: Request,
    work: _Work,
    model: Any,
    ids: torch.Tensor,
    layers: Mapping[int, Layer],
    evicted_at: NDArray[np.int32],
    reads: Reads | None,
    options: Options,
) -> tuple[Live | None, str | None]:
    """The live run, or why there is none."""
    if not options.passes:
        return None, "not asked for"
    reason = live.obstacle(trace, request, work.row)
    if reason is not None:
        return None, reason
    try:
        return (
            live.run_live(
                trace, request, work.row, model, ids, layers, evicted_at, reads, options.passes
            ),
            None,
        )
    except InputError as error:
        return None, str(error)


def _token_ids(trace: Trace, request: Request) -> torch.Tensor:
    ids = trace.tokens(request.request)["token_id"][: request.tokens]
    if ids.null_count or not len(ids):
        raise InputError(
            f"{ids.null_count} of {len(ids)} tokens of request {request.request} have no id in"
            f" {trace.path}; the model can be run on ids only; record a run with input_ids"
        )
    return torch.tensor(ids.to_pylist(), dtype=torch.long)[None]


def _key_check(trace: Trace, request: Request, specs: list[Layer]) -> KeyCheck:
    held = trace.holdings(request.request)
    able = [spec for spec in specs if "k" in held.layers[spec.layer]]
    places = np.unique(np.linspace(0, len(able) - 1, CHECKED_LAYERS).round().astype(int))
    chosen = [able[place] for place in places if able]
    recorded = {s.layer: trace.row_array("k", s.layer, request.request) for s in chosen}
    return KeyCheck(recorded, {spec.layer: spec.kv_head_numbers for spec in chosen})
