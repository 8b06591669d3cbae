"""Train the demo model: a small Llama on the text that `corpus` collected.

    python -m kvtrace_recorder.demo.corpus --work DIR
    python -m kvtrace_recorder.demo.train --work DIR --minutes 100
    python -m kvtrace_recorder.demo.export --work DIR

The objective is next-token prediction on every token and nothing else. The run checkpoints itself
every few minutes and continues from there when started again with the same ``--work``. The
learning rate warms up, stays, and falls linearly to zero over the last part of the budget, so any
budget ends in a finished model. Windows grow with the budget: 512 tokens, 1024, 2048 and 4096.
``OMP_WAIT_POLICY=passive`` in the environment helps on a shared CPU.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvtrace_recorder.demo import chunked_attention
from kvtrace_recorder.demo.tokenizer import encode_stream, save_stream, train_tokenizer
from kvtrace_recorder.demo.windows import Cursor, Windows

SNAPSHOT_TOKENS = tuple(sorted({int(b * 2**e) for e in range(17, 31) for b in (1.0, 1.5)}))
"""Token counts at which the weights are kept, to show later what emerged when."""


@dataclass(frozen=True)
class Recipe:
    """How to train. Times are shares of the budget, lengths are tokens."""

    learning_rate: float = 1.5e-3
    warmup_steps: int = 150
    # Batches of 4096 tokens are small: the second moment needs a longer memory than usual.
    betas: tuple[float, float] = (0.9, 0.99)
    decay_share: float = 0.65
    weight_decay: float = 0.1
    clip: float = 1.0
    batch_tokens: int = 4096
    medium_from: float = 0.6
    long_from: float = 0.8
    longest_from: float = 0.9
    seed: int = 20

    def rate(self, step: int, progress: float) -> float:
        """Learning rate at a step when `progress` (0 to 1) of the budget is used."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        left = min(1.0, max(0.0, 1.0 - progress) / self.decay_share)
        return self.learning_rate * warm * left

    def length(self, progress: float) -> int:
        """Window length when `progress` (0 to 1) of the budget is used."""
        steps = {0.0: 512, self.medium_from: 1024, self.long_from: 2048, self.longest_from: 4096}
        return [length for start, length in steps.items() if progress >= start][-1]


@dataclass(frozen=True)
class Budget:
    """When to stop: after `minutes` of training or `steps`, whichever comes first."""

    minutes: float | None = None
    steps: int | None = None

    def progress(self, step: int, seconds: float) -> float:
        """Share of the budget used, 0 to 1."""
        by_step = step / self.steps if self.steps else 0.0
        by_time = seconds / (self.minutes * 60) if self.minutes else 0.0
        return max(by_step, by_time)


def demo_config(vocab_size: int = 4096) -> LlamaConfig:
    """Shape of the demo model: 5.0 million parameters, grouped-query attention 8 to 2."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def prepare(work: Path) -> tuple[PreTrainedTokenizerFast, Path, Path]:
    """Train the tokenizer and encode both parts of the corpus, unless that was done before."""
    directory, streams = work / "tokenizer", [work / "train.npy", work / "heldout.npy"]
    if not directory.exists():
        train_tokenizer(texts(work / "corpus" / "train.jsonl")).save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for path in streams:
        if not path.exists():
            source = work / "corpus" / f"{path.stem}.jsonl"
            save_stream(path, encode_stream(tokenizer, texts(source)))
    return tokenizer, streams[0], streams[1]


def texts(path: Path) -> Iterator[str]:
    """Texts of a JSON-lines file."""
    with path.open() as file:
        for line in file:
            yield json.loads(line)["text"]


class Training:
    """A run: model, optimizer, data position and clock, all of it in one checkpoint file.

    Parameters
    ----------
    config
        Shape of the model.
    stream, heldout
        Token ids ``[token]`` to train on and to measure on.
    out
        Folder for ``state.pt``, ``log.jsonl`` and ``snapshots/``.
    recipe, budget
        How to train and when to stop.
    device
        Torch device.
    mixed
        Multiply matrices in bfloat16; weights, optimizer and loss stay float32. Pays on a GPU and
        on a CPU with AMX, where it is 4 to 10 times faster; without either it is slower.
    compiled
        Pass the loss through ``torch.compile``: a C++ compiler is needed, each window length
        costs a minute once, and steps are then about 1.2 times faster.
    """

    def __init__(
        self,
        config: LlamaConfig,
        stream: np.ndarray[Any, np.dtype[np.uint16]],
        heldout: np.ndarray[Any, np.dtype[np.uint16]],
        out: Path,
        recipe: Recipe,
        budget: Budget,
        device: torch.device,
        *,
        mixed: bool = False,
        compiled: bool = False,
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.model = LlamaForCausalLM(config).to(device)
        if device.type == "cpu":
            self.model.set_attn_implementation(chunked_attention.NAME)
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": recipe.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
            betas=recipe.betas,
            fused=True,
        )
        bos = config.bos_token_id
        self.windows = Windows(stream, bos, recipe.batch_tokens, recipe.seed)
        self.heldout = Windows(heldout, bos, recipe.batch_tokens, recipe.seed)
        self.out, self.recipe, self.budget, self.device = out, recipe, budget, device
        self.mixed = mixed
        self._train_loss = torch.compile(self._loss, dynamic=False) if compiled else self._loss
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.stopping = False
        (out / "snapshots").mkdir(parents=True, exist_ok=True)
        if (out / "state.pt").exists():
            self._restore()
        else:
            self.snapshot()

    def run(self, save_every_s: float = 180.0, stop_at_step: int | None = None) -> None:
        """Train until the budget is used, or until `stop_at_step`; checkpoint on the way."""
        last, saved, losses = time.monotonic(), time.monotonic(), []
        self.model.train()
        while (done := self.budget.progress(self.step, self.seconds)) < 1.0:
            losses.append(self._train_step(done))
            now = time.monotonic()
            self.seconds, last = self.seconds + now - last, now
            if self.step % 50 == 0:
                self._log(done, losses)
                losses = []
            if now - saved >= save_every_s:
                self.save()
                saved = time.monotonic()
            if self.stopping or self.step == stop_at_step:
                break
        self.save()
        if self.budget.progress(self.step, self.seconds) >= 1.0:
            self.snapshot()

    def stop(self, *_: object) -> None:
        """Finish the step at hand, checkpoint and return from `run`; a signal handler."""
        self.stopping = True

    def _train_step(self, progress: float) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.step, progress)
        inputs, targets = self.windows.next(self.recipe.length(progress))
        loss = self._train_loss(inputs.to(self.device), targets.to(self.device))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        before, self.step = self.tokens, self.step + 1
        self.tokens += targets.numel()
        if any(before < n <= self.tokens for n in SNAPSHOT_TOKENS):
            self.snapshot()
        return loss.detach()

    def _loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
            logits = self.model(input_ids=inputs, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def heldout_loss(self, batches: int = 8, length: int = 512) -> float:
        """Mean loss in nats over the first `batches` held-out batches, always the same ones."""
        self.heldout.cursor = Cursor()
        self.model.eval()
        total = 0.0
        for _ in range(batches):
            inputs, targets = self.heldout.next(length)
            total += float(self._loss(inputs.to(self.device), targets.to(self.device)))
        self.model.train()
        return total / batches

    def _log(self, progress: float, losses: list[torch.Tensor]) -> None:
        entry: dict[str, Any] = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 1),
            "loss": round(float(torch.stack(losses).mean()), 4),
            "lr": round(self.optimizer.param_groups[0]["lr"], 6),
            "length": self.windows.cursor.length,
        }
        if self.step % 200 == 0:
            entry["heldout"] = round(self.heldout_loss(), 4)
        line = json.dumps(entry)
        print(line, f"{progress:.1%}", flush=True)
        with (self.out / "log.jsonl").open("a") as file:
            file.write(line + "\n")

    def snapshot(self) -> None:
        """Keep the weights as float16 under the number of tokens seen."""
        weights = {n: p.detach().half().cpu().contiguous() for n, p in self._own_weights()}
        save_file(weights, self.out / "snapshots" / f"{self.tokens:012d}.safetensors")

    def _own_weights(self) -> list[tuple[str, torch.Tensor]]:
        # The output matrix is the embedding: named_parameters() gives a shared tensor once.
        return list(self.model.named_parameters())

    def save(self) -> None:
        """Write everything needed to continue, replacing the last checkpoint atomically."""
        state = {
            "model": dict(self._own_weights()),
            "optimizer": self.optimizer.state_dict(),
            "cursor": self.windows.cursor.state(),
            "rng": torch.get_rng_state(),
            "clock": (self.step, self.tokens, self.seconds),
        }
        temporary = self.out / "state.pt.tmp"
        torch.save(state, temporary)
        temporary.replace(self.out / "state.pt")

    def _restore(self) -> None:
        state = torch.load(self.out / "state.pt", map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["betas"] = self.recipe.betas  # the recipe holds, also where it was changed
        self.windows.cursor = Cursor(**state["cursor"])
        torch.set_rng_state(state["rng"].cpu())
        self.step, self.tokens, self.seconds = state["clock"]


def main() -> None:
    """Parse the command line and train until the budget is used or a signal says stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder that corpus.py filled")
    parser.add_argument("--minutes", type=float, help="training time, over all restarts")
    parser.add_argument("--steps", type=int, help="training steps, over all restarts")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mixed", action="store_true", help="bfloat16 matrix products")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    args = parser.parse_args()
    if args.minutes is None and args.steps is None:
        parser.error("give --minutes or --steps")
    torch.set_num_threads(args.threads)
    # Adam's moments of unused rows decay into denormals, which cost 100 times a normal number.
    torch.set_flush_denormal(True)
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if args.device == "auto" else args.device)
    tokenizer, stream, heldout = prepare(args.work)
    training = Training(
        demo_config(len(tokenizer)),
        np.load(stream, mmap_mode="r"),
        np.load(heldout, mmap_mode="r"),
        args.work / "run",
        Recipe(),
        Budget(args.minutes, args.steps),
        device,
        mixed=args.mixed,
        compiled=args.compile,
    )
    signal.signal(signal.SIGTERM, training.stop)
    signal.signal(signal.SIGINT, training.stop)
    training.run()


if __name__ == "__main__":
    main()
