"""What a replay costs, in units of F: the CPU time of the softmax(q k^T) rows, computed once.

    python benchmarks/replay.py [TRACE] [--tokens 1024,4096] [--layers 2] [--cases nine,pair]

Without a trace: layer 0 of the bundled model (8 query heads, 2 KV heads of 32) over the pages of
docs/, its q, k and v really computed (layer 0 needs no attention for them). F (torch, one thread)
and the replays are timed in turns; printed are medians of the paired ratios of CPU time, and of
several lengths the exponent that CPU time grows with.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import kvtrace
from kvtrace.model import Layer, LayerData, Request
from kvtrace.testing import log_sum_exp
from kvtrace_recorder.demo import MODEL_DIR
from kvtrace_viewer.replay import (
    Block,
    Cuts,
    Head,
    Measures,
    Policy,
    parse_budget,
    parse_policy,
    parse_when,
)
from kvtrace_viewer.replay.bounds import MovingBounds
from kvtrace_viewer.replay.engine import Run, blocks, replay_layer, workers
from kvtrace_viewer.replay.heads import heads_of
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


@cache
def bundled_model() -> tuple[LlamaForCausalLM, torch.Tensor]:
    """Return the model and the docs as its token ids [1, token]."""
    pages = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
    tokenize = AutoTokenizer.from_pretrained(str(MODEL_DIR))
    ids = tokenize("".join(page.read_text() for page in pages), return_tensors="pt").input_ids
    return LlamaForCausalLM.from_pretrained(str(MODEL_DIR)), ids


@cache
def bundled_heads(tokens: int) -> list[Head]:
    """KV heads of the bundled model's first layer over the docs' first tokens."""
    model, ids = bundled_model()
    layer = model.model.layers[0]
    with torch.no_grad():
        hidden = model.model.embed_tokens(ids[:, :tokens])
        tokens = hidden.shape[1]
        normed = layer.input_layernorm(hidden)
        projections = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        q, k, v = (one(normed).view(1, tokens, -1, 32).transpose(1, 2) for one in projections)
        turns = model.model.rotary_emb(hidden, torch.arange(tokens)[None])
        q, k = apply_rotary_pos_emb(q, k, *turns)
    q, k, v = (x[0].transpose(0, 1).contiguous().numpy() for x in (q, k, v))
    spec = Layer(0, 0, "full", 8, 2, 32, 32, 32**-0.5, None, None, False, None, 0, 0)
    data = LayerData(spec, q, k, v, log_sum_exp(q, k, spec))
    return heads_of(data, Request(0, 0, tokens, tokens // 2, None, None, 0), 1)


def trace_heads(path: str, tokens: int, layers: int) -> list[list[Head]]:
    """The first layers and tokens of a trace's longest request, half of them as its prompt."""
    trace = kvtrace.open(path)
    request = max(trace.requests(), key=lambda r: r.tokens)
    numbers = [layer.layer for layer in trace.layers if layer.model == request.model][:layers]
    data = [trace.layer_data(layer, request.request) for layer in numbers]
    return [[first_tokens(h, tokens) for h in heads_of(one, request, layers)] for one in data]


def first_tokens(head: Head, tokens: int) -> Head:
    """The first tokens of a head: later ones are not seen by them."""
    arrays = {name: getattr(head, name) for name in ("q", "k", "v", "lse")}
    cut = {name: None if x is None else x[:tokens] for name, x in arrays.items()}
    return changed(head, **cut, prompt_tokens=min(tokens, head.tokens) // 2)


def rows_once(layers: list[list[Head]]) -> None:
    """F: torch computes every attention row, 64 at a time."""
    for head in (head for heads in layers for head in heads):
        q = torch.from_numpy(np.ascontiguousarray(head.q.transpose(1, 0, 2)))
        k = torch.from_numpy(head.k)
        for start, stop in blocks(head):
            scores = (q[:, start:stop] @ k[:stop].T) * head.scale
            future = torch.arange(stop)[None] > torch.arange(start, stop)[:, None]
            scores.masked_fill_(future, -torch.inf).softmax(dim=2)


def runs_of(policies: Sequence[str | Policy], budgets: Sequence[str], when: str) -> list[Run]:
    """What a replay is asked for."""
    found = [parse_budget(b) for b in budgets]
    return [Run(parse_policy(p), parse_when(when), found) for p in policies]


def replay(layers: list[list[Head]], runs: list[Run], output_rows: int) -> None:
    """Everything a replay does but reading and storing."""
    pairs = sum(len(run.budgets) for run in runs)
    measures = Measures(output_rows=output_rows)
    # One worker, so that CPU time is work and not waiting threads.
    bounds = MovingBounds(pairs)
    with workers(1) as pool:
        for layer, heads in enumerate(layers):
            steps = StepTotals.zeros(pairs, heads[0].tokens)
            found = replay_layer(heads, runs, measures, pool, lambda count: None)
            for head in found:
                head.summarise(steps)
            bounds.add(layer, found)
    bounds.end_request()


@dataclass(frozen=True, kw_only=True)
class MinePolicy(Policy):
    """A policy as a user writes one: attention received, by the square root of the age."""

    name: ClassVar[str] = "mine"

    def start(self, head: Head, cuts: Cuts) -> NDArray[np.float64]:
        """[token]."""
        return np.zeros(head.tokens)

    def scores(self, block: Block, cuts: Cuts, state: NDArray[np.float64]) -> NDArray[np.float64]:
        """After each cut."""
        sums = block.received.cumsum(axis=0) + state[: block.stop]
        state[: block.stop] = sums[-1]
        age = np.maximum(cuts.rows[:, None] + 1 - np.arange(block.stop), 1)
        return np.asarray(sums[cuts.rows - block.start] / np.sqrt(age))


CASES: dict[str, tuple[list[str | Policy], list[str], int]] = {
    "pair": (["h2o"], ["20%"], 0),
    "lru": (["lru"], ["20%"], 0),
    "full": (["full"], BUDGETS, 0),
    "mine": ([MinePolicy()], BUDGETS, 0),
    "nine": ([*NINE], BUDGETS, 0),
    "oracle": ([*NINE, "oracle"], BUDGETS, 0),
    "sampled": ([*NINE], BUDGETS, Measures().output_rows),
    "exact": ([*NINE], BUDGETS, 1 << 30),
}
"""Policies, budgets, rows of the output error (0: none)."""

TEXTS = {
    "pair": "h2o at 20%",
    "lru": "lru at 20%",
    "full": "full x 8: rows and measures alone",
    "mine": "a Python policy x 8",
    "nine": "9 policies x 8 budgets",
    "oracle": "9 and the oracle x 8",
    "sampled": "9 x 8, output error sampled",
    "exact": "9 x 8, output error of every row",
}


def cpu(work: Callable[[], None]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def time_case(layers: list[list[Head]], case: str, when: str, repeats: int) -> tuple[float, float]:
    """Time one case in turns with F: the median ratio, and the median CPU seconds."""
    policies, budgets, output_rows = CASES[case]
    if not output_rows:
        layers = [[changed(head, v=None) for head in heads] for heads in layers]
    runs = runs_of(policies, budgets, when)
    ratios, seconds = [], []
    for _ in range(repeats):
        f = cpu(lambda: rows_once(layers))
        seconds.append(cpu(lambda: replay(layers, runs, output_rows or 1)))
        ratios.append(seconds[-1] / f)
    return statistics.median(ratios), statistics.median(seconds)


def main() -> None:
    """Time, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", nargs="?")
    parser.add_argument("--tokens", default="2048", help="lengths, comma separated")
    parser.add_argument("--layers", type=int, default=99, help="of a trace, the first ones")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--when", default="step,stream")
    parser.add_argument("--cases", default=",".join(CASES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    lengths = [int(n) for n in args.tokens.split(",")]
    warm = [bundled_heads(160)]
    for when in args.when.split(","):
        for case in args.cases.split(","):
            time_case(warm, case, when, 1)  # compiled code is read from its cache
            spent: dict[int, float] = {}
            for tokens in lengths:
                layers = (
                    trace_heads(args.trace, tokens, args.layers)
                    if args.trace
                    else [bundled_heads(tokens)]
                )
                ratio, spent[tokens] = time_case(layers, case, when, args.repeats)
                print(
                    f"{when:7s} {TEXTS[case]:34s} {layers[0][0].tokens:6d} tokens "
                    f"{ratio:6.2f} F {spent[tokens]:8.3f} s",
                    flush=True,
                )
            if len(lengths) > 1:
                slope = np.polyfit(np.log(lengths), np.log(list(spent.values())), 1)[0]
                print(f"{when:7s} {TEXTS[case]:34s} grows with tokens to the {slope:.2f}")
    print(f"most memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB")


if __name__ == "__main__":
    main()
