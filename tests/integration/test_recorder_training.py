"""A training that is recorded is the training that would have run; what is recorded of it."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.tiny import llama
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import kvtrace
from kvtrace.cli import main
from kvtrace.errors import InputError
from kvtrace_recorder import TraceCallback, record
from kvtrace_viewer.derived.emergence import by_training_step

pytestmark = pytest.mark.usefixtures("one_thread", "writer_thread")


def tiny(kernel: str = "sdpa") -> Any:
    """A tiny Llama with random weights and dropout, the same each time."""
    return llama(attention_dropout=0.1, attn_implementation=kernel).train()


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 64, (4, 12), generator=generator) for _ in range(count)]


def train(model: Any, steps: int = 6, accumulate: int = 1) -> list[torch.Tensor]:
    """Losses of all passes, and all gradients of the last."""
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for number, ids in enumerate(batches(steps * accumulate)):
        loss = model(ids, labels=ids).loss
        loss.backward()
        found.append(loss.detach())
        if (number + 1) % accumulate == 0:
            gradients = [p.grad.clone() for p in model.parameters()]
            optimizer.step()
            optimizer.zero_grad()
    return found + gradients


def identical(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def steps_of(path: Path) -> list[tuple[Any, ...]]:
    found = kvtrace.open(path).sql("select phase, training_step, num_tokens from steps order by 1")
    return [tuple(row.values()) for row in found.to_pylist()]


CHECKPOINTING: list[dict[str, Any] | None] = [
    None,
    {"use_reentrant": False},
    {"use_reentrant": True},
]


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_losses_and_gradients_are_those_of_an_unrecorded_loop(
    kernel: str, checkpointing: dict[str, Any] | None, tmp_path: Path
) -> None:
    def model() -> Any:
        made = tiny(kernel)
        if checkpointing is not None:
            made.activation_checkpointing_enable(activation_checkpointing_kwargs=checkpointing)
        return made

    plain, recorded = train(model()), model()
    with record(recorded, tmp_path / "all.kvtrace", strict=True, dtype="float32") as recording:
        assert identical(train(recorded), plain)
    # Once, whether the layers run a second time on the way back or not.
    assert (recording.rows, recording.gaps) == (6 * 4 * 12, {})
    assert steps_of(recording.path) == [("train", step, 48) for step in range(6)]
    trace = kvtrace.open(recording.path)
    assert [r.tokens for r in trace.requests()] == [12] * 24
    assert trace.tokens(23)["token_id"].to_pylist() == batches(6)[5][3].tolist()

    recorded = model()
    with record(recorded, tmp_path / "some.kvtrace", strict=True, dtype="float32") as recording:
        recording.sample(every=3, sequences=2)
        assert identical(train(recorded), plain)
    assert steps_of(recording.path) == [("train", 0, 48), ("train", 3, 48)]
    some = kvtrace.open(recording.path)
    assert [r.batch_index for r in some.requests()] == [0, 1, 0, 1]
    for own, same in ((0, 0), (5, 13)):
        for layer in range(2):
            assert (
                some.attention(layer, 1, request=own) == trace.attention(layer, 1, request=same)
            ).all()
    counted = some.sql("select what, sum(count)::int as n from gaps group by what order by what")
    assert [tuple(row.values()) for row in counted.to_pylist()] == [
        ("sequences", 4),
        ("training passes", 4),
    ]


def gaps(path: Path) -> list[tuple[str, int, str]]:
    found = kvtrace.open(path).table("gaps").to_pylist()
    return [(gap["what"], gap["count"], gap["reason"]) for gap in found]


@pytest.mark.writer_process
def test_optimizer_steps_are_counted_not_passes(tmp_path: Path) -> None:
    model = tiny()
    with record(model, tmp_path / "a.kvtrace", strict=True):
        train(model, steps=2, accumulate=2)
    assert [step for _, step, _ in steps_of(tmp_path / "a.kvtrace")] == [0, 0, 1, 1]
    with record(model, tmp_path / "b.kvtrace", strict=True) as recording:
        # A loop that knows better, such as one that goes on from a checkpoint.
        recording.sample(every=10)
        for number in (18, 19, 20, 20, 21, 30):
            recording.training_step = number
            model(batches(1)[0]).logits.sum().backward()
    assert [step for _, step, _ in steps_of(tmp_path / "b.kvtrace")] == [20, 30]


def test_evaluation_and_generation_do_not_count_as_training(tmp_path: Path) -> None:
    model, (ids, *_) = tiny(), batches(1)

    def mixed() -> None:
        for _ in range(2):
            model.train()
            model(ids, labels=ids).loss.backward()
            model.eval()
            with torch.no_grad():
                model(ids)
            model.train()
            # In training mode, and yet no training: gradients are off.
            model.generate(ids, max_new_tokens=2, do_sample=False, eos_token_id=None)

    with record(model, tmp_path / "a.kvtrace", strict=True):
        mixed()
    found = kvtrace.open(tmp_path / "a.kvtrace").sql(
        "select phase, training_step is null as outside from steps order by step"
    )
    one = [("train", False), ("prefill", True), ("prefill", True), ("decode", True)]
    assert [tuple(row.values()) for row in found.to_pylist()] == one * 2
    with record(model, tmp_path / "b.kvtrace", strict=True) as recording:
        recording.sample(every=2)
        mixed()
    assert steps_of(tmp_path / "b.kvtrace") == [("train", 0, 48)]


def test_padding_is_left_out_and_packed_batches_are_gaps(tmp_path: Path) -> None:
    model, (ids, *_) = tiny(), batches(1)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    with record(model, tmp_path / "a.kvtrace", strict=True) as recording:
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        assert not recording.gaps
        packed = torch.arange(6).repeat(2)[None]
        model(ids[:1], position_ids=packed, labels=ids[:1]).loss.backward()
    trace = kvtrace.open(tmp_path / "a.kvtrace")
    assert [r.tokens for r in trace.requests()] == [12, 8, 12, 12]
    ((_, _, reason),) = gaps(trace.path)
    assert "several sequences packed into one" in reason


def test_numbers_below_one_are_refused(tmp_path: Path) -> None:
    with record(tiny(), tmp_path / "a.kvtrace") as recording:
        with pytest.raises(InputError, match="every=0 was given"):
            recording.sample(every=0)
        with pytest.raises(InputError, match="sequences=0 was given"):
            recording.sample(every=1, sequences=0)


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    given: dict[str, Any] = {
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "no",
        "logging_strategy": "no",
        "seed": 5,
    }
    data = [{"input_ids": ids, "labels": ids} for batch in batches(8) for ids in batch]
    arguments = TrainingArguments(output_dir=str(folder / "out"), **{**given, **options})
    return Trainer(
        model=tiny(),
        args=arguments,
        train_dataset=data,
        eval_dataset=data[:2],
        callbacks=list(callbacks),
    )


def test_a_trainer_is_recorded_by_a_callback(tmp_path: Path) -> None:
    plain = trainer(tmp_path)
    loss = plain.train().training_loss
    path = tmp_path / "run.kvtrace"
    recorded = trainer(tmp_path, TraceCallback(path, every=3, strict=True, dtype="float32"))
    assert recorded.train().training_loss == loss
    for x, y in zip(plain.model.parameters(), recorded.model.parameters(), strict=True):
        assert torch.equal(x, y)
    # Of two accumulated batches the first, of its two sequences the first; no evaluation.
    assert steps_of(path) == [("train", step, 24) for step in (0, 3, 6)]
    trace = kvtrace.open(path)
    assert (trace.status, [r.tokens for r in trace.requests()]) == ("complete", [12, 12, 12])


class _Fails(TrainerCallback):  # type: ignore[misc]
    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise self.error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_training_that_is_cut_off_closes_its_trace(
    error: type[BaseException], tmp_path: Path
) -> None:
    original = Trainer.train
    callback = TraceCallback(tmp_path / "run.kvtrace", every=2)
    with pytest.raises(error):
        trainer(tmp_path, callback, _Fails(error)).train()
    assert kvtrace.open(callback.path).status == "cut off"
    assert [step for _, step, _ in steps_of(callback.path)] == [0, 2, 4]
    # Nothing listens any more, and another recording may begin.
    with record(tiny(), tmp_path / "next.kvtrace", strict=True):
        pass
    del callback
    gc.collect()
    assert Trainer.train is original


def test_a_training_script_is_sampled_by_the_verb(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch\n"
        "torch.set_num_threads(1)\n"
        "from test_recorder_training import tiny, train\n"
        "train(tiny(), steps=7)\n"
    )
    out = tmp_path / "run.kvtrace"
    words = ["--out", str(out), "--sample-every", "3", "--", str(tmp_path / "train.py")]
    assert main(["record", *words]) == 0
    assert steps_of(out) == [("train", step, 48) for step in (0, 3, 6)]
    assert kvtrace.open(out).rows == 3 * 12


def test_the_example_shows_what_emerges(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "record_training.py"
    out = tmp_path / "training.kvtrace"
    command = [sys.executable, str(example), "--steps", "4", "--every", "2", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "first_token_mean" in done.stdout
    found = by_training_step(kvtrace.open(out))
    assert found.num_rows == 2 * 2 * 4
    trace = kvtrace.open(out)
    first, *_ = found.to_pylist()
    assert (first["training_step"], first["layer"], first["head"]) == (0, 0, 0)
    weights = trace.attention(0, 0)
    assert first["first_token"] == pytest.approx(weights[65:, 0].mean(), rel=1e-4)
    # Nothing has been learned yet: attention is uniform.
    assert (first["sinks"], first["heavy_hitters"]) == (0, 0)


def test_a_trace_without_training_shows_nothing_emerging(tmp_path: Path) -> None:
    with record(tiny(), tmp_path / "a.kvtrace"):
        pass
    with pytest.raises(InputError, match="holds no step of a training"):
        by_training_step(kvtrace.open(tmp_path / "a.kvtrace"))
