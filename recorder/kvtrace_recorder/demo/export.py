"""Save the trained demo model as a transformers directory.

    python -m kvtrace_recorder.demo.export --work DIR [--out DIR]

Weights are stored as float16, which halves the size of a clone, while ``config.json`` says float32:
``AutoModelForCausalLM.from_pretrained`` then computes in float32 without being told.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM

from kvtrace_recorder.demo import MODEL_DIR
from kvtrace_recorder.demo.train import demo_config


def model_from(weights: dict[str, torch.Tensor], vocab_size: int = 4096) -> LlamaForCausalLM:
    """The demo model in float32 and evaluation mode, with the given parameters."""
    model = LlamaForCausalLM(demo_config(vocab_size))
    model.load_state_dict({n: w.float() for n, w in weights.items()}, strict=False)
    model.tie_weights()
    return model.eval()


def snapshot_model(path: Path) -> LlamaForCausalLM:
    """The model as it was at a snapshot that the training kept."""
    return model_from(load_file(path))


def export(work: Path, out: Path) -> None:
    """Write config, generation config, weights and tokenizer of ``work/run/state.pt`` to `out`."""
    state = torch.load(work / "run" / "state.pt", map_location="cpu", weights_only=True)
    model = model_from(state["model"]).half()
    model.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=1, pad_token_id=1, do_sample=False
    )
    model.save_pretrained(out)
    config = out / "config.json"
    fields = json.loads(config.read_text())
    (out / "model.safetensors").chmod(0o644)
    config.write_text(json.dumps({**fields, "dtype": "float32"}, indent=2) + "\n")
    AutoTokenizer.from_pretrained(work / "tokenizer").save_pretrained(out)


def main() -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the training")
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="directory to write")
    args = parser.parse_args()
    export(args.work, args.out)


if __name__ == "__main__":
    main()
