"""What a replay costs, in units of F: the CPU time of the softmax(q k^T) rows, computed once.

    python benchmarks/replay.py [TRACE] [--tokens 2048] [--repeats 5]

Without a trace: one layer of a random-weights attention (8 query heads, 2 KV heads of 32), really
run on token ids. F and the replays are timed in turns, with one torch thread and CPU time; printed
are medians of the paired ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace as changed

import numpy as np
import torch

import kvtrace
from kvtrace.model import Layer, LayerData, Request
from kvtrace.testing import log_sum_exp
from kvtrace_viewer.replay import POLICIES, Head, Measures, parse_budget, parse_policy, parse_when
from kvtrace_viewer.replay.engine import Run, blocks, replay_layer, workers
from kvtrace_viewer.replay.run import heads_of
from kvtrace_viewer.replay.totals import StepTotals

NINE = [
    "full",
    "sliding_window",
    "streaming_llm",
    "random",
    "lru",
    "lfu",
    "h2o",
    "observed_attention",
    "knorm",
]
BUDGETS = ["2%", "5%", "10%", "20%", "30%", "40%", "50%", "75%"]


def random_weights_heads(tokens: int) -> list[Head]:
    """KV heads of a random-weights attention layer, really run."""
    torch.manual_seed(1)
    with torch.no_grad():
        hidden = torch.nn.Embedding(500, 256)(torch.randint(500, (tokens,)))
        hidden = torch.nn.functional.rms_norm(
            hidden + 0.3 * torch.randn(tokens, 256).cumsum(0), (256,)
        )
        q, k, v = (torch.nn.Linear(256, width)(hidden).numpy() for width in (256, 64, 64))
    q, k, v = (x.reshape(tokens, -1, 32) for x in (3 * q, k, v))
    spec = Layer(0, 0, "full", 8, 2, 32, 32, 32**-0.5, None, None, False, None, 0, 0)
    data = LayerData(spec, q, k, v, log_sum_exp(q, k, spec))
    return heads_of(data, Request(0, 0, tokens, tokens // 2, None, None, 0), 1)


def trace_heads(path: str) -> list[list[Head]]:
    """All layers of a trace's longest request."""
    trace = kvtrace.open(path)
    request = max(trace.requests(), key=lambda r: r.tokens)
    layers = [layer.layer for layer in trace.layers if layer.model == request.model]
    return [
        heads_of(trace.layer_data(layer, request.request), request, len(layers)) for layer in layers
    ]


def rows_once(layers: list[list[Head]]) -> None:
    """F: torch computes every attention row, 64 at a time."""
    for head in (head for heads in layers for head in heads):
        q = torch.from_numpy(np.ascontiguousarray(head.q.transpose(1, 0, 2)))
        k = torch.from_numpy(head.k)
        for start, stop in blocks(head):
            scores = (q[:, start:stop] @ k[:stop].T) * head.scale
            future = torch.arange(stop)[None] > torch.arange(start, stop)[:, None]
            scores.masked_fill_(future, -torch.inf).softmax(dim=2)


def replay(
    layers: list[list[Head]], policies: list[str], budgets: list[str], when: str, output: int
) -> None:
    """Everything a replay does but storing."""
    runs = [
        Run(parse_policy(p), parse_when(when), [parse_budget(b) for b in budgets]) for p in policies
    ]
    # One worker, so that CPU time is work and not waiting threads.
    with workers(1) as pool:
        for heads in layers:
            steps = StepTotals.zeros(len(policies) * len(budgets), heads[0].tokens)
            for head in replay_layer(
                heads, runs, Measures(output_rows=output), pool, lambda count: None
            ):
                head.summarise(steps)


def cpu(work: Callable[[], None]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    """Time, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", nargs="?")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    layers = trace_heads(args.trace) if args.trace else [random_weights_heads(args.tokens)]
    cases = {
        "1 pair (h2o 20%)": (["h2o"], ["20%"]),
        "1 pair (lru 20%)": (["lru"], ["20%"]),
        "9 policies x 8 budgets": (NINE, BUDGETS),
        "9 and the oracle x 8": ([*NINE, "oracle"], BUDGETS),
    }
    head = layers[0][0]
    print(
        f"{args.trace or 'random weights'}: {head.tokens} tokens, prompt {head.prompt_tokens}, "
        f"{len(layers)} layers, {len(layers[0])} KV heads of {head.group} query heads"
    )
    rows_once(layers)
    for when in ("step", "stream"):
        for name, (policies, budgets) in cases.items():
            for output in (0, 256):
                time_case(layers, policies, budgets, when, output, name, args.repeats)

    for policy, kind in POLICIES.items():
        time_case(layers, [policy], BUDGETS, kind.default_when, 0, f"{policy} x 8", args.repeats)


def time_case(
    layers: list[list[Head]],
    policies: list[str],
    budgets: list[str],
    when: str,
    output: int,
    name: str,
    repeats: int,
) -> None:
    """Time one case in turns with F and print the median ratio."""
    needs_values = any("v" in POLICIES[policy].signals for policy in policies)
    if not output and not needs_values:
        layers = [[changed(head, v=None) for head in heads] for heads in layers]

    def work() -> None:
        replay(layers, policies, budgets, when, output or 1)

    work()
    ratios = []
    for _ in range(repeats):
        f = cpu(lambda: rows_once(layers))
        ratios.append(cpu(work) / f)
    error = f"output error over at most {output} rows" if output else "no output error"
    print(f"{when:7s} {name:38s} {error:38s} {statistics.median(ratios):6.2f} F  (F {f:.3f} s)")


if __name__ == "__main__":
    main()
