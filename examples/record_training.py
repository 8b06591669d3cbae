"""Record a training and see where its attention goes as it learns.

    python examples/record_training.py                      a tiny model, seconds on a CPU
    python examples/record_training.py --checkpoints DIR    what a training has kept, instead

The tiny model (2 layers of 4 heads) is trained by the bundled model's own code on the source of
Python's standard library, 40 steps of 2048 tokens. With --checkpoints the bundled model is read
from the snapshots of its training (`kvtrace_recorder.demo.train --work DIR`) over its held-out
text; `training_step` is then the number of tokens it had seen.
"""

import argparse
import sysconfig
import tempfile
from pathlib import Path

import duckdb
import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig

import kvtrace
from kvtrace_recorder import demo, record
from kvtrace_recorder.demo.evaluate import ATTENTION_LENGTH, windows
from kvtrace_recorder.demo.export import snapshot_model
from kvtrace_recorder.demo.tokenizer import encode_stream
from kvtrace_recorder.demo.train import Budget, Recipe, Training
from kvtrace_viewer.derived.emergence import by_training_step

QUERY = """
select training_step,
       round(avg(first_token), 5) as first_token_mean,
       round(max(first_token), 5) as first_token_max,
       sum(sinks > 0)::int as heads_with_sinks, round(avg(heavy_hitters), 2) as heavy_hitters,
       round(avg(heavy_share), 4) as heavy_share
from emergence group by training_step order by training_step
"""


def train(out: str, steps: int, every: int) -> None:
    """Train a tiny model and record every N-th step of it."""
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=0,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py"))
    texts = (path.read_text(encoding="utf-8") for path in sources)
    stream = encode_stream(tokenizer, texts)
    recipe = Recipe(batch_tokens=2048, warmup_steps=5)
    with tempfile.TemporaryDirectory() as work:
        budget, cpu = Budget(steps=steps), torch.device("cpu")
        training = Training(config, stream, stream, Path(work), recipe, budget, cpu)
        with record(training.model, out, force=True) as recording:
            recording.sample(every=every)
            training.run()


def checkpoints(out: str, work: Path) -> None:
    """Record held-out text as each snapshot of a training reads it."""
    stream = np.load(work / "heldout.npy", mmap_mode="r")
    ids = windows(stream, ATTENTION_LENGTH, 2)
    with record(None, out, force=True, on_full="wait") as recording:
        for path in sorted((work / "run" / "snapshots").glob("*.safetensors")):
            recording.training_step = int(path.stem)
            snapshot_model(path).train()(input_ids=ids, use_cache=False)


def main() -> None:
    """Record, then print a row for each recorded step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="traces/training.kvtrace")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--checkpoints", type=Path, metavar="DIR")
    args = parser.parse_args()
    if args.checkpoints is None:
        train(args.out, args.steps, args.every)
    else:
        checkpoints(args.out, args.checkpoints)
    emergence = by_training_step(kvtrace.open(args.out))
    with duckdb.connect() as connection:
        connection.register("emergence", emergence)
        print(connection.sql(QUERY))


if __name__ == "__main__":
    main()
