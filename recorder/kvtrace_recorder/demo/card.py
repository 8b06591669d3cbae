"""Write the demo model's card from what `evaluate` measured.

python -m kvtrace_recorder.demo.card --work DIR
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from kvtrace_recorder.demo import MODEL_DIR

SINK = 0.3
"""A head counts as a sink head when position 0 gets more than this of its attention."""

TEMPLATE = """\
---
license: mit
library_name: transformers
language: en
---
# The kvtrace demo model

A small causal Llama, trained from nothing so that kvtrace has a real model to record where none can
be downloaded. It is a specimen for looking at a KV cache; it is no assistant, and its text reads
like documentation without being true.

{shape}

## What it can show, and what it cannot

{verdict}

## Data

{size:.0f} MB of English documentation and source text, all under permissive licences, collected by
`corpus.py` from packages of Debian 12, Python's standard library and the NumPy wheel. One document
in fifty is held out. The text is not distributed with the model.

| source | licence | MB |
|---|---|---|
{sources}

## Training

Next-token prediction on every token, BOS in front of every window, nothing else in the objective.
AdamW, warm-up, a linear decay of the learning rate over most of the run, weight decay 0.1, gradient
clipping 1.0, batches of 4096 tokens. Windows of 512 tokens, then 1024, and at the end 2048 and
4096. {steps} steps, {tokens:.1f} million tokens ({epochs:.2f} epochs) in {minutes:.0f} minutes
on two CPU cores shared with other work, matrix products in bfloat16, weights in float32. The stored
weights are float16; they load as float32. The scripts have the settings as they ended: the rate
began at 3e-3 and was halved by hand at 7.6 million tokens, where the loss fell too slowly, and the
last five minutes, at 4096 tokens, were added after a first evaluation. The table shows it.

| tokens (million) | window | learning rate | held-out loss |
|---|---|---|---|
{history}

To train it again, for longer or on a GPU (from a clone; Debian or a derivative for the corpus):

```
python -m kvtrace_recorder.demo.corpus --work DIR
python -m kvtrace_recorder.demo.train --work DIR --minutes 100
python -m kvtrace_recorder.demo.export --work DIR
python -m kvtrace_recorder.demo.evaluate --work DIR
python -m kvtrace_recorder.demo.card --work DIR
```

## Measured on held-out text

Loss {loss:.3f} nats a token in windows of 512, {loss_4096:.3f} in windows of 4096 on the same text
(guessing among 4096 tokens costs 8.32). By position in the window of 4096, and for the same tokens
with the text cut into windows of 512:

| position | {buckets} |
|---|{bucket_rule}|
| nats, window of 4096 | {bucket_values} |
| nats, windows of 512 | {bucket_short} |

Attention in windows of 1024 tokens, queries at position 64 and later, mean over windows. Rows are
layers, columns heads; heads 0-3 read KV head 0, heads 4-7 KV head 1.

### Mean attention to position 0 (BOS), in percent

{bos}

### Share of a head's attention that lands on the 5% of keys that receive most, in percent

{top}

### Mean attention to the previous token, in percent

{previous}

### Induction: attention to the token that followed the same token in the first copy, in percent

Held-out text of 256 tokens, given twice. Loss on the first copy {first:.2f} nats, on the second
{second:.2f}.

{induction}

### Which tokens are read

| token | share of all attention, % | share of keys, % |
|---|---|---|
{read}

How these numbers grew during training is in `emergence.json` beside the scripts.
"""


def table(values: list[list[float]]) -> str:
    """Markdown table of percentages ``[layer][head]``."""
    heads = range(len(values[0]))
    lines = ["| layer | " + " | ".join(f"h{h}" for h in heads) + " |", "|---" * (len(heads) + 1)]
    lines[1] += "|"
    for layer, row in enumerate(values):
        lines.append(f"| {layer} | " + " | ".join(f"{100 * v:.1f}" for v in row) + " |")
    return "\n".join(lines)


def verdict(found: dict[str, Any]) -> str:
    """Say in words what the tables below show."""
    bos = np.array(found["attention"]["bos"])
    top = np.array(found["attention"]["top"])
    previous = np.array(found["attention"]["previous"])
    induction = np.array(found["copying"]["induction"])
    gain = found["copying"]["first"] - found["copying"]["second"]
    far = list(found["loss_by_position"].items())[-1]
    worse = far[1] - found["loss_by_position_short"][far[0]]
    names = ", ".join(f"`{json.dumps(token)[1:-1]}`" for token, _, _ in found["read"][:5])
    sinks = int((bos > SINK).sum())
    if sinks:
        sink_line = (
            f"- **BOS sinks: yes, in {sinks} of {bos.size} heads** (position 0 gets more than"
            f" {SINK:.0%}); the strongest head gives it {bos.max():.0%}."
        )
    else:
        sink_line = (
            f"- **BOS sinks: no.** The strongest head gives position 0 {bos.max():.1%} of its"
            f" attention, the mean head {bos.mean():.2%}. Sinks grow with hundreds of millions of"
            " tokens; this model has not seen enough, and nothing was done to force them. A policy"
            " that protects the first tokens therefore has little to gain here."
        )
    return "\n".join(
        [
            f"- **Heavy hitters: yes.** The 5% of keys that receive most get {top.mean():.0%} of"
            f" the attention, {top.max():.0%} in the most concentrated head. Most read: {names}.",
            f"- **Previous-token heads: {'yes' if previous.max() > 0.3 else 'weak'}.** The"
            f" strongest gives {previous.max():.0%} of its attention to the token before.",
            sink_line,
            f"- **Long contexts: {'not to the end' if worse > 0.05 else 'yes'}.** At positions"
            f" {far[0]} a token costs {abs(worse):.2f} nats {'more' if worse > 0 else 'less'} than"
            " with 512 tokens of context (table below).",
            f"- **Induction: {'yes' if induction.max() > 0.2 else 'no'}.** The best head puts"
            f" {induction.max():.1%} on the token that followed last time; a repeated text costs"
            f" {abs(gain):.2f} nats {'less' if gain > 0 else 'more'} the second time.",
        ]
    )


def render(found: dict[str, Any], config: dict[str, Any]) -> str:
    """Fill the card from the evaluation and the model's ``config.json``."""
    buckets = found["loss_by_position"]
    train_mb = [(s["name"], s["licence"], s["train_bytes"] / 1e6) for s in found["sources"]]
    shape = (
        f"{found['parameters'] / 1e6:.2f} million parameters: {config['num_hidden_layers']} layers,"
        f" width {config['hidden_size']}, {config['num_attention_heads']} query heads and"
        f" {config['num_key_value_heads']} KV heads of {config['head_dim']}, tied embeddings, rope,"
        f" {config['max_position_embeddings']} positions, byte-level BPE of"
        f" {config['vocab_size']} tokens with `<|bos|>` in front of every text."
    )
    attention, copies = found["attention"], found["copying"]
    return TEMPLATE.format(
        shape=shape,
        verdict=verdict(found),
        size=sum(mb for _, _, mb in train_mb),
        sources="\n".join(f"| {n} | {lic} | {mb:.1f} |" for n, lic, mb in sorted(train_mb)),
        steps=found["steps"],
        tokens=found["tokens_seen"] / 1e6,
        epochs=found["tokens_seen"] / found["train_tokens"],
        minutes=found["training_minutes"],
        history="\n".join(
            f"| {h['tokens'] / 1e6:.1f} | {h['length']} | {h['lr']:.1e} | {h['heldout']:.2f} |"
            for h in found["history"]
        ),
        loss=found["loss"],
        loss_4096=found["loss_4096"],
        buckets=" | ".join(buckets),
        bucket_rule="|".join("---" for _ in buckets),
        bucket_short=" | ".join(f"{v:.2f}" for v in found["loss_by_position_short"].values()),
        bucket_values=" | ".join(f"{v:.2f}" for v in buckets.values()),
        bos=table(attention["bos"]),
        top=table(attention["top"]),
        previous=table(attention["previous"]),
        induction=table(copies["induction"]),
        first=copies["first"],
        second=copies["second"],
        read="\n".join(
            f"| `{json.dumps(token, ensure_ascii=False)}` | {100 * share:.1f} | {100 * keys:.1f} |"
            for token, share, keys in found["read"]
        ),
    )


def main() -> None:
    """Parse the command line and write the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the training")
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    args = parser.parse_args()
    found = json.loads((args.work / "evaluation.json").read_text())
    config = json.loads((args.model / "config.json").read_text())
    (args.model / "README.md").write_text(render(found, config), encoding="utf-8")


if __name__ == "__main__":
    main()
