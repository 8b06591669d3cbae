"""What a comparison of policies costs with a replay, and with two other tools, on the same texts.

    python benchmarks/replay_peers.py [--tokens 512,2048] [--json FILE]

The bundled model reads the first tokens of a topic of Python's documentation, three quarters as
its prompt, the rest a token at a time. CPU seconds, all threads and child processes counted, of

    record     the model once, recorded (and once without, to compare)
    replay     eight policies at eight budgets, one cut after the prompt, from that trace
    kvpress    the same 64 by running the model once for each: its prompt pressed, the rest in one
               piece through what is left (where installed)
    sinkvis    the model once with output_attentions, and its five policies at one budget, which it
               decides for one head of the last layer (where installed)

What is not installed is left out with a line that says so. kvpress wants an older transformers, so
peers run in a process of their own that looks into a folder first: pip install --target DIR
kvpress==0.5.5 sinkvis==1.0.2, and --peers DIR.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from transformers import DynamicCache
from transformers.utils import logging

from kvtrace_recorder import demo

TEXT = "specialnames"
BUDGETS = ["2%", "5%", "10%", "20%", "30%", "40%", "50%", "75%"]
PRESSES = {
    "streaming_llm": "StreamingLLMPress",
    "random": "RandomPress",
    "knorm": "KnormPress",
    "keydiff": "KeyDiffPress",
    "lagkv": "LagKVPress",
    "tova": "TOVAPress",
    "snapkv": "SnapKVPress",
    "expected_attention": "ExpectedAttentionPress",
}
"""Our policies, and the classes of kvpress that do the same."""

PAIRS = len(PRESSES) * len(BUDGETS)
PEERS = {"kvpress": "kvpress==0.5.5", "sinkvis": "sinkvis==1.0.2"}
TITLES = {
    "kvpress": f"kvpress, {PAIRS} runs",
    "sinkvis": "sinkvis, 5 policies, 1 budget, 1 head",
}
MISSING = "{0}: not installed (pip install --target DIR {1}, and --peers DIR)"

FIVE = ("full", "lru", "sliding_window", "streaming_llm", "h2o")


def main() -> None:
    """Time, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", default="512,2048", help="lengths, comma separated")
    parser.add_argument("--repeats", type=int, default=3, help="of everything but kvpress")
    parser.add_argument("--peers", type=Path, help="folder that the other tools lie in")
    parser.add_argument("--json", type=Path, help="write the numbers")
    parser.add_argument("--alone", choices=("kvpress", "sinkvis"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    lengths = [int(text) for text in args.tokens.split(",")]
    model, tokenizer = demo.load()
    ids = tokenizer(topics[TEXT], return_tensors="pt")["input_ids"]
    if args.alone:
        times = time_peer(args.alone, model, ids, lengths, args.repeats)
        print(json.dumps([version(args.alone), transformers.__version__, times]))
        return
    found = {n: ours(model, ids[:, :n], args.repeats) for n in (96, *lengths)}  # first: to warm up
    for peer in ("kvpress", "sinkvis"):
        answer = ask(peer, args)
        if answer is None:
            print(MISSING.format(peer, PEERS[peer]))
            continue
        used, library, times = answer
        print(f"{peer} {used}, with transformers {library}")
        for n, seconds in zip(lengths, times, strict=True):
            found[n][TITLES[peer]] = seconds
    for n in lengths:
        for name, seconds in found[n].items():
            print(f"{n:6d} tokens  {name:48s} {seconds:8.2f} CPU s")
    if args.json:
        args.json.write_text(json.dumps({n: found[n] for n in lengths}, indent=1))


def ours(model: Any, ids: torch.Tensor, repeats: int) -> dict[str, float]:
    """CPU seconds of the model, recorded and not, and of the replay."""
    # The peers' own process has another transformers, which the recorder need not know.
    import kvtrace
    import kvtrace_recorder
    from kvtrace_viewer.replay import replay

    prompt = 3 * ids.shape[1] // 4
    found = {"the model alone": median(lambda: read_on(model, ids, prompt), repeats)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.kvtrace"

        def record() -> None:
            with kvtrace_recorder.record(model, path, force=True):
                read_on(model, ids, prompt)

        found["the model recorded"] = median(record, repeats)
        trace = kvtrace.open(path)
        found[f"replay of {PAIRS} pairs"] = median(
            lambda: replay(trace, list(PRESSES), BUDGETS, "prefill", store=False), repeats
        )
    return found


def ask(peer: str, args: argparse.Namespace) -> Any:
    """Versions and CPU seconds from a process of a peer's own; None where it is not there."""
    script = [sys.executable, __file__, "--alone", peer]
    options = ["--tokens", args.tokens, "--repeats", str(args.repeats)]
    folders = [str(args.peers)] if args.peers else []
    folders += [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run(
        [*script, *options], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode and f"No module named '{peer}'" in done.stderr:
        return None
    if done.returncode:
        raise SystemExit(f"{peer} did not run:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def time_peer(
    peer: str, model: Any, ids: torch.Tensor, lengths: list[int], repeats: int
) -> list[float]:
    """CPU seconds of one peer at each length; the first is done twice, to warm up."""
    if peer == "sinkvis":
        model.set_attn_implementation("eager")
        simulate(model, ids[:, :96])
        return [median(lambda: simulate(model, ids[:, :n]), repeats) for n in lengths]  # noqa: B023
    press_all(model, ids[:, :256], 192)
    return [cpu(lambda: press_all(model, ids[:, :n], 3 * n // 4)) for n in lengths]  # noqa: B023


def read_on(model: Any, ids: torch.Tensor, prompt: int) -> None:
    """The prompt at once, then a token at a time."""
    cache = DynamicCache()
    with torch.no_grad():
        model(ids[:, :prompt], past_key_values=cache)
        for at in range(prompt, ids.shape[1]):
            model(ids[:, at : at + 1], past_key_values=cache)


def press_all(model: Any, ids: torch.Tensor, prompt: int) -> None:
    """Every policy at every budget, the model run anew for each."""
    kvpress = import_module("kvpress")
    for name in PRESSES.values():
        for budget in BUDGETS:
            press = getattr(kvpress, name)(compression_ratio=1 - float(budget[:-1]) / 100)
            cache = DynamicCache()
            with torch.no_grad(), quiet():
                with press(model):
                    model(ids[:, :prompt], past_key_values=cache)
                at = torch.arange(prompt, ids.shape[1])[None]
                model(ids[:, prompt:], past_key_values=cache, position_ids=at)


def simulate(model: Any, ids: torch.Tensor) -> None:
    """What sinkvis gives: kept tokens, by policy."""
    with quiet(), torch.no_grad(), import_module("sinkvis").SinkVis(model) as seen:
        model(ids, output_attentions=True)
        for policy in FIVE:
            seen.simulate_policy(policy, ids.shape[1] // 5)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without a peer's advice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def median(work: Callable[[], Any], repeats: int) -> float:
    """Median CPU seconds of some calls."""
    return statistics.median(cpu(work) for _ in range(repeats))


def cpu(work: Callable[[], Any]) -> float:
    """CPU seconds of one call, in this process and the children that ended meanwhile."""
    before = sum(os.times()[:4])
    work()
    return sum(os.times()[:4]) - before


if __name__ == "__main__":
    main()
