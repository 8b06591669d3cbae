"""What recording costs the model: paired runs, one torch thread, the writer at work meanwhile.

    python benchmarks/record_overhead.py [--repeats 7] [--device cpu|cuda] [--json FILE]
    python benchmarks/record_overhead.py --models bundled --workloads decode --arms events,qkv

Every repeat times the plain model and the same run under each arm in turn, so that a drift of the
machine falls on both; printed are the median of the paired ratios and their quartiles. Arms:

    events, summary, qkv   kvtrace at that detail, its writing included; what starting and closing
                           a recording take is in columns of its own
    neighbour              no recorder, but a process that does nothing but count on another core:
                           what sharing the machine costs by itself
    output_attentions      the model asked for its attention, which makes it run eager attention
    sinkvis                sinkvis.AttentionCapture on the same (pip install sinkvis, where wanted)

Workloads: 128 tokens decoded after a prompt of 512, and a prompt of 2048 in one pass. Models: the
bundled one, and a Llama of 8 layers and width 512 with random weights (its speed is a real
one's); with --device cuda a Llama-8B-shaped one in bfloat16 at batch 1 and 32 (--batches), whose
qkv take 384 KiB a token: 8 GB a decode and 26 GB a prefill at batch 32, in the temporary folder.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

import kvtrace
from kvtrace_recorder import record
from kvtrace_recorder.demo import load

DETAILS = ("events", "summary", "qkv")
#: Eager attention that is asked for would not fit beside a large batch.
EAGER = ("output_attentions", "sinkvis")
ARMS = ",".join((*DETAILS, "neighbour", *EAGER))
PROMPT, NEW, LONG = 512, 128, 2048


@dataclass
class Result:
    """One arm on one workload: seconds, and ratios to the plain run beside each."""

    model: str
    workload: str
    arm: str
    plain_s: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    open_s: list[float] = field(default_factory=list)
    close_s: list[float] = field(default_factory=list)
    bytes_per_token: float | None = None
    raw_bytes_per_token: float | None = None


def bundled(kernel: str) -> Any:
    model, _ = load()
    model.set_attn_implementation(kernel)
    return model


def llama(kernel: str, **shape: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(max_position_embeddings=8192, pad_token_id=0, eos_token_id=None, **shape)
    return LlamaForCausalLM._from_config(config, attn_implementation=kernel).eval()


def small(kernel: str) -> Any:
    return llama(
        kernel,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=4096,
    )


def llama_8b(kernel: str) -> Any:
    with torch.device("cuda"):
        return llama(
            kernel,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128256,
            dtype=torch.bfloat16,
        )


def decode(model: Any, batch: int = 1, new: int = NEW, **options: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 4000, (batch, PROMPT), generator=generator).to(model.device)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        **options,
    )


def prefill(model: Any, batch: int = 1, length: int = LONG, **options: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 4000, (batch, length), generator=generator).to(model.device)
    with torch.no_grad():
        model(ids, use_cache=True, logits_to_keep=1, **options)


def seconds(run: Callable[[], None]) -> float:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


@contextmanager
def recording(model: Any, detail: str, result: Result, warm: Callable[[], None]) -> Iterator[None]:
    """A recording that has written a first run; how long it took to open and to close."""
    folder = Path(tempfile.mkdtemp())
    path = folder / "a.kvtrace"
    # Without a limit: what is thinned would be measured as something else.
    recorder = record(model, path, detail=detail, on_full="wait", max_bytes=None, progress=False)
    result.open_s.append(seconds(recorder.__enter__))
    warm()
    # The tokenizer is loaded for the first tokens, once a recording, in a thread of its own.
    while not recorder.rows:
        time.sleep(0.05)
    yield
    result.close_s.append(seconds(lambda: recorder.__exit__(None, None, None)))
    trace = kvtrace.open(path)
    assert not recorder.gaps, recorder.gaps
    result.bytes_per_token = trace.bytes / trace.rows
    result.raw_bytes_per_token = raw_bytes(trace)
    shutil.rmtree(folder)


def raw_bytes(trace: kvtrace.Trace) -> float:
    """Bytes of a token in the arrays that were asked for, as stored, before compression."""
    total = 0.0
    for row in trace.table("array_catalog").to_pylist():
        size = {"float16": 2, "float32": 4}[row["dtype"]]
        for length in json.loads(row["shape"]):
            size *= length
        total += size
    return total


@contextmanager
def neighbour() -> Iterator[None]:
    """A process that keeps another core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    time.sleep(0.2)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def arms(model: Any, eager: Any, result: Result, warm: Callable[[Any], None]) -> Any:
    """The context of an arm, the model it runs, and what it asks the model for."""
    if result.arm in DETAILS:
        return recording(model, result.arm, result, lambda: warm(model)), model, {}
    if result.arm == "neighbour":
        return neighbour(), model, {}
    if result.arm == "output_attentions":
        return nullcontext(), eager, {"output_attentions": True}
    import sinkvis

    return sinkvis.AttentionCapture(eager), eager, {"output_attentions": True}


def measure(
    name: str,
    make: Callable[[str], Any],
    batch: int,
    chosen: list[str],
    workloads: list[str],
    repeats: int,
) -> Iterator[Result]:
    model = make("sdpa")
    eager = make("eager") if set(chosen) & set(EAGER) else None
    works: dict[str, Callable[..., None]] = {"decode": decode, "prefill": prefill}
    for workload in workloads:
        work = works[workload]
        results = [Result(name, f"{workload} x{batch}", arm) for arm in chosen]

        def warm(given: Any, workload: str = workload) -> None:
            if workload == "decode":
                decode(given, batch, new=8)
            else:
                prefill(given, batch, length=64)

        warm(model)
        if eager is not None:
            warm(eager)
        for repeat in range(repeats):
            for result in results:
                context, runner, options = arms(model, eager, result, warm)
                plain = seconds(lambda: work(model, batch))  # noqa: B023 - run at once
                with context:
                    asked = options | (
                        {"return_dict_in_generate": True}
                        if options and workload == "decode"
                        else {}
                    )
                    taken = seconds(lambda: work(runner, batch, **asked))  # noqa: B023
                result.plain_s.append(plain)
                result.ratios.append(taken / plain)
                print(
                    f"{name} {workload} {repeat}: {result.arm} {taken / plain:.3f}", file=sys.stderr
                )
        yield from results


def show(results: list[Result]) -> None:
    table = Table(
        "model",
        "workload",
        "plain s",
        "arm",
        "ratio",
        "quartiles",
        "open s",
        "close s",
        "bytes/token",
        "asked for",
    )
    for r in results:
        low, middle, high = statistics.quantiles(r.ratios, n=4)
        cells = [
            r.model,
            r.workload,
            f"{statistics.median(r.plain_s):.3f}",
            r.arm,
            f"{statistics.median(r.ratios):.3f}",
            f"{low:.3f} {middle:.3f} {high:.3f}",
            *(f"{statistics.median(x):.2f}" if x else "" for x in (r.open_s, r.close_s)),
            *("" if x is None else f"{x:,.0f}" for x in (r.bytes_per_token, r.raw_bytes_per_token)),
        ]
        table.add_row(*cells)
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--arms", help=f"default: {ARMS}; with cuda {','.join(DETAILS)}")
    parser.add_argument("--batches", default="1,32", help="of the model on cuda (default: 1,32)")
    parser.add_argument("--models", default="bundled,llama-8x512")
    parser.add_argument("--workloads", default="decode,prefill")
    parser.add_argument("--json", metavar="FILE", help="the numbers of every run")
    args = parser.parse_args()
    disable_progress_bar()
    torch.set_num_threads(1)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("this torch finds no CUDA device")
    chosen = (args.arms or (ARMS if args.device == "cpu" else ",".join(DETAILS))).split(",")
    if "sinkvis" in chosen and not _has_sinkvis():
        print("without sinkvis: pip install sinkvis==1.0.2 to have it beside", file=sys.stderr)
        chosen.remove("sinkvis")
    cases: list[tuple[str, Callable[[str], Any], int]] = [
        case
        for case in (("bundled", bundled, 1), ("llama-8x512", small, 1))
        if case[0] in args.models.split(",")
    ]
    if args.device == "cuda":
        cases = [("llama-8b", llama_8b, int(batch)) for batch in args.batches.split(",")]
    results: list[Result] = []
    for name, make, batch in cases:
        results += measure(name, make, batch, chosen, args.workloads.split(","), args.repeats)
    machine = platform.processor() or platform.machine()
    if args.device == "cuda":
        machine += f", {torch.cuda.get_device_name()}"
    print(f"{machine}, torch {torch.__version__}, one thread")
    show(results)
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(r) for r in results], indent=1))


def _has_sinkvis() -> bool:
    try:
        import sinkvis  # noqa: F401
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    main()
