"""`replay`: a trace through policies and budgets, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvtrace.cached import cached_requests
from kvtrace.errors import InputError
from kvtrace.model import Request
from kvtrace.trace import Trace
from kvtrace_viewer.replay.amounts import Budget
from kvtrace_viewer.replay.collected import Collected
from kvtrace_viewer.replay.engine import workers
from kvtrace_viewer.replay.measure import Measures
from kvtrace_viewer.replay.pairs import pairs_of
from kvtrace_viewer.replay.plugins import mistakes_explained
from kvtrace_viewer.replay.policy import Policy
from kvtrace_viewer.replay.replayable import check
from kvtrace_viewer.replay.rerotation import known_ropes
from kvtrace_viewer.replay.result import Result
from kvtrace_viewer.replay.storage import store_result
from kvtrace_viewer.replay.summary import summed_up
from kvtrace_viewer.replay.when import When


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
    pairs = pairs_of(policies, budgets, when)
    chosen = _requests(trace, requests)
    check(trace, [r.request for r in chosen], [(pair.policy, pair.when) for pair in pairs])
    turns = (
        known_ropes(trace, [r.request for r in chosen], [p.policy for p in pairs])
        if rerotate
        else None
    )
    tell = progress or (lambda share: None)
    gathered = Collected(trace, chosen, pairs, measures or Measures(), tell, turns)
    with workers() as pool, mistakes_explained():
        for request in chosen:
            gathered.add(request, pool, of=sum(r.tokens for r in chosen))
    results = [summed_up(gathered, p) for p in range(len(pairs))]
    if store:
        for result in results:
            store_result(result, trace.replay_directory())
    return results


def _requests(trace: Trace, numbers: Sequence[int] | None) -> list[Request]:
    known = {request.request: request for request in trace.requests()}
    for number in numbers or ():
        if number not in known:
            raise InputError(
                f"request {number} was not found in {trace.path}; it has "
                f"{', '.join(map(str, list(known)[:8]))}; choose one of them"
            )
    return [known[n] for n in dict.fromkeys(numbers or cached_requests(trace))]
