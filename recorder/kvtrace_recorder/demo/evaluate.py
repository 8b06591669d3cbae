"""Measure the demo model on text it was never trained on.

    python -m kvtrace_recorder.demo.evaluate --work DIR                 one JSON for the final model
    python -m kvtrace_recorder.demo.evaluate --work DIR --emergence     a row for each snapshot

Attention comes from the model's own eager path, in float32. Every number is explained where it is
computed; `card` turns the JSON into the model card.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, LlamaForCausalLM

from kvtrace_recorder.demo import MODEL_DIR
from kvtrace_recorder.demo.export import snapshot_model

FIRST_QUERY = 64
"""Queries before this position have too few keys to say much about where attention goes."""
ATTENTION_LENGTH = 1024
TOP_SHARE = 0.05
BUCKETS = (1, 64, 256, 512, 1024, 2048, 3072, 4097)
"""Edges of the position buckets of the loss; the last position is 4096."""
SHORT = 512
"""Window length that the long one is compared with; it divides 4096."""
COPY_LENGTH = 256


def windows(stream: NDArray[np.uint16], length: int, count: int, bos: int = 0) -> torch.Tensor:
    """Evenly spaced windows ``[window, token]`` of `length` tokens, the first of them BOS."""
    starts = np.linspace(0, len(stream) - length, count).astype(int)
    rows = np.stack([stream[s : s + length - 1] for s in starts]).astype(np.int64)
    return torch.from_numpy(np.insert(rows, 0, bos, axis=1))


@torch.no_grad()
def losses(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Loss in nats of predicting each token but the first, ``[window, token - 1]``."""
    rows = []
    for row in ids:
        logits = model(input_ids=row[None, :-1], use_cache=False).logits[0]
        rows.append(torch.nn.functional.cross_entropy(logits, row[1:], reduction="none"))
    return torch.stack(rows)


def loss_by_position(nats: torch.Tensor) -> dict[str, float]:
    """Mean loss of the tokens at the positions of each bucket; column 0 predicts position 1."""
    return {
        f"{low}-{high - 1}": float(nats[:, low - 1 : high - 1].mean())
        for low, high in pairwise(BUCKETS)
    }


def short_context(ids: torch.Tensor) -> torch.Tensor:
    """The same text ``[window, 1 + n * SHORT]`` cut into windows of `SHORT`, each behind BOS.

    Texts differ in difficulty more than positions do: only the same tokens, predicted once with all
    of the window before them and once with little, tell whether far positions are of use.
    """
    text = ids[:, 1:].reshape(-1, SHORT)
    return torch.cat([ids[:1, :1].expand(len(text), 1), text], dim=1)


@torch.no_grad()
def attentions(model: LlamaForCausalLM, ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """Attention of each window in turn, ``[layer, head, query, key]``."""
    model.set_attn_implementation("eager")
    for row in ids:
        out = model(input_ids=row[None], use_cache=False, output_attentions=True)
        yield torch.stack([layer[0] for layer in out.attentions])
    model.set_attn_implementation("sdpa")


def attention_profile(model: LlamaForCausalLM, ids: torch.Tensor) -> dict[str, Any]:
    """Where queries past `FIRST_QUERY` look, as mean over windows, by layer and head.

    Returns
    -------
    dict
        ``bos``: mean attention to position 0. ``previous``: to the position just before.
        ``top``: of everything those queries spend, the share that lands on the `TOP_SHARE` of keys
        that receive most. ``read``: by token id, the share of the attention of all heads that
        goes to keys holding that token, and the share of keys that do, for the first ten.
    """
    bos, previous, top = [], [], []
    received: defaultdict[int, float] = defaultdict(float)
    present: defaultdict[int, float] = defaultdict(float)
    for row, weights in zip(ids, attentions(model, ids), strict=True):
        late = weights[:, :, FIRST_QUERY:]
        per_key = late.mean(dim=2)
        bos.append(per_key[..., 0])
        steps = torch.arange(late.shape[2])
        previous.append(late[:, :, steps, steps + FIRST_QUERY - 1].mean(dim=-1))
        best = per_key.topk(max(1, int(TOP_SHARE * per_key.shape[-1])), dim=-1).values
        top.append(best.sum(dim=-1))
        for token, share in zip(row.tolist(), per_key.mean(dim=(0, 1)).tolist(), strict=True):
            received[token] += share / len(ids)
            present[token] += 1 / ids.numel()
    most = sorted(received, key=received.__getitem__, reverse=True)[:10]
    return {
        "bos": torch.stack(bos).mean(0).tolist(),
        "previous": torch.stack(previous).mean(0).tolist(),
        "top": torch.stack(top).mean(0).tolist(),
        "read": [(token, received[token], present[token]) for token in most],
    }


def copying(model: LlamaForCausalLM, ids: torch.Tensor) -> dict[str, Any]:
    """What the model does with held-out text that stands in the window twice.

    `ids` are windows ``[window, 1 + COPY_LENGTH]``; the text after BOS is repeated once.

    Returns
    -------
    dict
        ``induction``: by layer and head, attention from a token of the second copy to the token
        that followed it in the first. ``first``, ``second``: mean loss of each copy.
    """
    twice = torch.cat([ids, ids[:, 1:]], dim=1)
    n = COPY_LENGTH
    nats = losses(model, twice)
    query = torch.arange(n + 1, 2 * n)
    scores = [w[:, :, query, query - n + 1].mean(dim=-1) for w in attentions(model, twice)]
    return {
        "induction": torch.stack(scores).mean(0).tolist(),
        "first": float(nats[:, :n].mean()),
        "second": float(nats[:, n:].mean()),
    }


def measure(model: LlamaForCausalLM, stream: NDArray[np.uint16], count: int) -> dict[str, Any]:
    """Loss at 512 tokens, attention profile and copying, each over `count` held-out windows."""
    return {
        "loss": float(losses(model, windows(stream, 513, 4 * count)).mean()),
        "attention": attention_profile(model, windows(stream, ATTENTION_LENGTH, count)),
        "copying": copying(model, windows(stream, COPY_LENGTH + 1, count)),
    }


def evaluate(work: Path, model_dir: Path, count: int) -> dict[str, Any]:
    """Everything that the model card says about the model in `model_dir`."""
    stream = np.load(work / "heldout.npy", mmap_mode="r")
    model = LlamaForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids = windows(stream, BUCKETS[-1], 2 * count)
    long = losses(model, ids)
    short = losses(model, short_context(ids)).view(long.shape)
    result = measure(model, stream, count)
    read = result["attention"]["read"]
    state = torch.load(work / "run" / "state.pt", weights_only=True, mmap=True)
    steps, tokens, seconds = state["clock"]
    return result | {
        "loss": float(short.mean()),
        "loss_4096": float(long.mean()),
        "loss_by_position": loss_by_position(long),
        "loss_by_position_short": loss_by_position(short),
        "read": [(tokenizer.decode([t]), share, keys) for t, share, keys in read],
        "parameters": model.num_parameters(),
        "tokens_seen": tokens,
        "steps": steps,
        "training_minutes": seconds / 60,
        "train_tokens": len(np.load(work / "train.npy", mmap_mode="r")),
        "history": history(work / "run" / "log.jsonl"),
        "sources": json.loads((work / "corpus" / "sources.json").read_text()),
    }


def history(log: Path, rows: int = 12) -> list[dict[str, float]]:
    """About `rows` lines of a training log that carry a held-out loss, the last one among them."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    measured = [entry for entry in entries if "heldout" in entry]
    return measured[:: -max(1, len(measured) // rows)][::-1]


def emergence(work: Path, count: int) -> list[dict[str, float]]:
    """One row for each kept snapshot: what the model could do after so many tokens."""
    stream = np.load(work / "heldout.npy", mmap_mode="r")
    rows = []
    for path in sorted((work / "run" / "snapshots").glob("*.safetensors")):
        found = measure(snapshot_model(path), stream, count)
        profile, copies = found["attention"], found["copying"]
        rows.append(
            {
                "tokens_seen": int(path.stem),
                "heldout_loss": round(found["loss"], 4),
                "bos_attention_mean": round(float(np.mean(profile["bos"])), 5),
                "bos_attention_max": round(float(np.max(profile["bos"])), 5),
                "top5_share_mean": round(float(np.mean(profile["top"])), 4),
                "previous_token_max": round(float(np.max(profile["previous"])), 4),
                "induction_max": round(float(np.max(copies["induction"])), 4),
                "copy_gain_nats": round(copies["first"] - copies["second"], 4),
            }
        )
    return rows


def main() -> None:
    """Parse the command line, measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the training")
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--windows", type=int, default=16, help="held-out windows per measure")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--emergence", action="store_true", help="measure the snapshots instead")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.emergence:
        out = MODEL_DIR.parent / "emergence.json"
        rows = emergence(args.work, args.windows)
        out.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    else:
        out = args.work / "evaluation.json"
        out.write_text(json.dumps(evaluate(args.work, args.model, args.windows), indent=1) + "\n")
    print(out)


if __name__ == "__main__":
    main()
