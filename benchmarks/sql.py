"""The cookbook's questions on a trace of about two gigabytes, with numpy doing the same beside it.

    python benchmarks/sql.py [TRACE] [--gigabytes 2] [--repeats 5]

Without a trace: a random-weights Llama (8 layers, 16 query heads, 4 KV heads of 128) is recorded
while it reads the bundled prompt's tokens over and over and generates, into a temporary folder
that is removed. Printed are medians of warm runs, SQL and numpy in turns: SQL from the question to
the Arrow table; numpy from columns and arrays that are in memory already.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.sql_by_hand import BY_HAND, Data  # noqa: E402
from tests.cookbook import agree, recipes  # noqa: E402

import kvtrace  # noqa: E402
from kvtrace.sql import derive  # noqa: E402

PROMPT_TOKENS = 4096
NEW_TOKENS = 32


def record(path: Path, gigabytes: float) -> None:
    """Record a random-weights Llama until its q, k and v make so many gigabytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from kvtrace_recorder import demo
    from kvtrace_recorder.session.recording import record as recording

    _, tokenizer = demo.load()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=512, num_hidden_layers=8,
        num_attention_heads=16, num_key_value_heads=4, head_dim=128, max_position_embeddings=8192,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = tokenizer(demo.PROMPT, return_tensors="pt")["input_ids"][0]
    row_bytes = config.num_hidden_layers * (16 + 2 * 4) * 128 * 2
    requests = math.ceil(gigabytes * 1e9 / row_bytes / (PROMPT_TOKENS + NEW_TOKENS))
    with recording(model, path, tokenizer=tokenizer, on_full="wait", max_bytes=None):
        for number in range(requests):
            # A new beginning each time, so that the requests are not one.
            prompt = ids.roll(-37 * number).repeat(1 + PROMPT_TOKENS // len(ids))[:PROMPT_TOKENS]
            model.generate(
                input_ids=prompt[None], attention_mask=torch.ones_like(prompt)[None],
                max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=True,
            )  # fmt: skip


def replay(path: Path) -> None:
    """Two policies on the first request, with who wanted what was evicted."""
    command = [sys.executable, "-m", "kvtrace.cli", "replay", str(path), "--request", "0"]
    options = ["--policy", "h2o", "--policy", "streaming_llm", "--budget", "25%", "--regret"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*command, *options, "--when", "step"], check=True, env=environment)


def seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure(trace: kvtrace.Trace, repeats: int) -> None:
    print(f"{'question':66} {'rows':>4} {'sql ms':>7} {'numpy ms':>9}  same")
    data, slowest = Data(trace), 0.0
    for recipe, by_hand in zip(recipes(), BY_HAND, strict=True):
        # Once each, to read what they read.
        answer, other = trace.sql(recipe.sql).to_pylist(), by_hand(data)
        turns = [
            (seconds(lambda: trace.sql(recipe.sql)), seconds(lambda: by_hand(data)))  # noqa: B023
            for _ in range(repeats)
        ]
        sql, numpy = (1e3 * statistics.median(times) for times in zip(*turns, strict=True))
        slowest = max(slowest, sql)
        verdict = "yes" if agree(answer, other) else "NO"
        print(f"{recipe.title[:66]:66} {len(answer):4} {sql:7.0f} {numpy:9.1f}  {verdict}")
    print(f"slowest question: {slowest:.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("trace", nargs="?", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.trace or Path(folder) / "random-weights.kvtrace"
        if args.trace is None:
            took = seconds(lambda: record(path, args.gigabytes))
            print(f"recorded with random weights in {took:.0f} s")
            replay(path)
        trace = kvtrace.open(path)
        took = seconds(lambda: derive(trace))
        first = seconds(lambda: trace.sql("select count(*) from key_attention"))
        print(f"{trace.bytes / 1e9:.2f} GB, {trace.rows:,} rows, {len(trace.requests())} requests;")
        print(f"derived tables: {took:.1f} s once; into trace.duckdb: {first:.1f} s")
        measure(trace, args.repeats)


if __name__ == "__main__":
    main()
