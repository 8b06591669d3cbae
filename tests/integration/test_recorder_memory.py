"""Recording takes the same memory however long the run is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest

#: What recording may add to the growth of a run, from its first thousand tokens to its last.
LIMIT = 300 << 20
FIRST = 1024
CHUNK = 256


@pytest.mark.parametrize(
    "tokens",
    [
        8 * 1024,
        # A prefill of 32k tokens takes the model minutes on one core.
        pytest.param(32 * 1024, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_memory_is_flat(tmp_path: Path, tokens: int) -> None:
    trace = tmp_path / "run.kvtrace"
    runs = [start(tokens), start(tokens, trace)]
    plain, recorded = growth(runs[0], 0), growth(runs[1], tokens)
    print(f"growth from {FIRST} to {tokens} tokens: {plain >> 20} MiB plain, {recorded >> 20} MiB")
    assert recorded - plain <= LIMIT


def test_a_decode_step_keeps_no_second_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer's old keys go when its new ones are there, not with all others after the step."""
    import torch
    from transformers import DynamicCache

    from kvtrace_recorder import demo, pipeline, record

    # Where the model pauses another thread copies what is held, and holds it meanwhile.
    monkeypatch.setattr(pipeline, "TICK_SECONDS", 1000.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, tokenizer = demo.load()
    ids = tokenizer("The list", return_tensors="pt")["input_ids"]
    cache = DynamicCache(config=model.config)
    old: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def before(*_: Any) -> None:
        old[:] = [weakref.ref(layer.keys) for layer in cache.layers if layer.keys is not None]

    def after(*_: Any) -> None:
        alive.append(sum(one() is not None for one in old[:-1]))

    model.register_forward_pre_hook(before)
    model.model.layers[-1].register_forward_hook(after)
    with torch.inference_mode(), record(model, tmp_path / "run.kvtrace"):
        for _ in range(40):
            model(input_ids=ids[:, :1], past_key_values=cache)
    torch.set_num_threads(threads)
    assert alive == [0] * 40


def start(tokens: int, trace: Path | None = None) -> subprocess.Popen[str]:
    """Start a run in a process of its own."""
    words = [sys.executable, __file__, str(tokens), *([] if trace is None else [str(trace)])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=environment)


def growth(run: subprocess.Popen[str], rows: int) -> int:
    """Bytes that a run grows by from FIRST tokens on, its writer included."""
    out, error = run.communicate()
    assert run.returncode == 0, error
    found = json.loads(out)
    assert found["rows"] == rows
    return int(found["peak"]) - int(found["first"])


def memory() -> int:
    """Bytes resident in this process and its children; what they share counts once."""
    mine = os.getpid()
    children = Path(f"/proc/{mine}/task/{mine}/children").read_text().split()
    total = 0
    for pid in (str(mine), *children):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


class Peak:
    """Largest memory seen until it is stopped."""

    def __init__(self) -> None:
        self.found = memory()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return max(self.found, memory())

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self.found = max(self.found, memory())


def run(tokens: int, trace: str | None) -> None:
    """Prefill the bundled model in chunks; prints memory at FIRST tokens and the peak after."""
    from contextlib import nullcontext

    import torch
    from transformers import DynamicCache

    import kvtrace
    from kvtrace_recorder import demo, record

    torch.set_num_threads(1)
    model, tokenizer = demo.load()
    text = tokenizer(demo.PROMPT, return_tensors="pt")["input_ids"][0]
    ids = text.repeat(tokens // len(text) + 1)[None, :tokens]
    cache = DynamicCache(config=model.config)
    recording = (
        nullcontext()
        if trace is None
        else record(model, trace, detail="qkv", on_full="wait", tokenizer=tokenizer)
    )
    first = 0
    with torch.inference_mode(), recording:
        for at in range(0, tokens, CHUNK):
            model(input_ids=ids[:, at : at + CHUNK], past_key_values=cache, logits_to_keep=1)
            if at + CHUNK == FIRST:
                # The writer is a moment behind.
                time.sleep(1)
                first, peak = memory(), Peak()
    found = {"first": first, "peak": peak.stop(), "rows": 0}
    if trace is not None:
        opened = kvtrace.open(trace)
        assert opened.status == "complete"
        assert opened.table("gaps").num_rows == 0, opened.table("gaps").to_pylist()
        found["rows"] = opened.rows
    print(json.dumps(found))


if __name__ == "__main__":
    run(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
