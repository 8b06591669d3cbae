"""Record the golden trace of this version: `python tests/golden/make.py`.

Run once for every released version, before its tag. It records a tiny Llama with seeded random
weights, writes what the trace gives beside it, and leaves out trace.duckdb, which is derived.
Golden traces of older versions are never written again: that they open is what they are for.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

import kvtrace
from kvtrace.layout import DATABASE, FORMAT_VERSION
from kvtrace_recorder import record

HERE = Path(__file__).parent
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": None,
}


def main(folder: Path) -> Path:
    """Record into a folder; the trace."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    path = folder / f"{kvtrace.__version__}-format-{FORMAT_VERSION}.kvtrace"
    prompts = torch.randint(1, 64, (2, 12))
    with record(model, path, progress=False, on_full="wait", command=["golden"]):
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
        )
    found: dict[str, Any] = numbers(kvtrace.open(path))
    np.savez_compressed(path.with_suffix(".npz"), **found)
    (path / DATABASE).unlink()
    return path


def numbers(trace: kvtrace.Trace) -> dict[str, NDArray[Any]]:
    """What a golden trace must go on giving, by name."""
    found: dict[str, NDArray[Any]] = {}
    for one in trace.requests():
        tokens = trace.tokens(one.request)
        found[f"tokens {one.request}"] = tokens["token_id"].to_numpy()
        for spec in trace.layers_of(one.request):
            name = f"{one.request} {spec.layer}"
            found[f"v {name}"] = np.asarray(trace.layer_data(spec.layer, one.request).v)
            maps = [trace.attention(spec.layer, h, request=one.request) for h in range(4)]
            found[f"attention {name}"] = np.stack(maps)
    steps = trace.sql("select phase, num_tokens from steps order by step")
    found["phases"] = np.array(steps["phase"].to_pylist())
    found["step tokens"] = steps["num_tokens"].to_numpy()
    return found


if __name__ == "__main__":
    print(main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE))
