"""`kvtrace record` of programs with models of their own: found by what attends, nothing changed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import kvtrace
from kvtrace.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention

torch.manual_seed(0)
torch.set_num_threads(1)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = (t.view(*x.shape[:2], 2, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return x + scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(50, 16), nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 50)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

model = Tiny()
"""
DECODE = """
ids = torch.tensor([[3, 1, 4, 1, 5]])
helper = nn.Linear(4, 4)
with torch.no_grad():
    for _ in range(3):
        helper(torch.ones(1, 4))
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
print(ids.tolist())
"""
TRAIN = """
loss, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.1)
ids = torch.arange(24).view(4, 6)
for _ in range(5):
    optimizer.zero_grad()
    found = loss(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    found.backward()
    optimizer.step()
print(found.item())
"""


def script(path: Path, *parts: str) -> str:
    file = path / "plain.py"
    file.write_text("".join(parts))
    return str(file)


def record(path: Path, *words: str) -> kvtrace.Trace:
    out = path / "a.kvtrace"
    before = nn.Module.__call__
    assert main(["record", "--out", str(out), "--strict", *words]) == 0
    assert nn.Module.__call__ is before
    return kvtrace.open(out)


@pytest.mark.parametrize("command", [(), ("env", sys.executable)])
def test_a_script_that_knows_nothing_of_transformers_is_recorded(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    file = script(tmp_path, MODEL, DECODE)
    plain = subprocess.run([sys.executable, file], capture_output=True, text=True, check=True)
    out = tmp_path / "a.kvtrace"
    words = ["-m", "kvtrace.cli", "record", "--out", str(out), "--", *command, file]
    found = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert found.stdout == plain.stdout
    assert found.stderr.count("recording Tiny, a plain PyTorch model") == 1
    trace = kvtrace.open(out)
    assert (trace.status, [r.tokens for r in trace.requests()]) == ("complete", [5, 6, 7])
    assert [layer.name for layer in trace.layers] == ["blocks.0", "blocks.1"]
    assert trace.table("models")["architecture"].to_pylist() == ["Tiny"]
    assert trace.table("gaps").num_rows == 0


def test_of_a_training_loop_only_the_model_is_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = script(tmp_path, MODEL, TRAIN)
    trace = record(tmp_path, "--sample-every", "2", "--", file)
    assert trace.table("models")["architecture"].to_pylist() == ["Tiny"]
    steps = trace.table("steps").to_pylist()
    assert [(s["phase"], s["training_step"]) for s in steps] == [
        ("train", 0),
        ("train", 2),
        ("train", 4),
    ]
    assert [r.tokens for r in trace.requests()] == [6, 6, 6]
    assert float(capsys.readouterr().out) > 0


def test_several_models_are_recorded_each_as_its_own(tmp_path: Path) -> None:
    other = """
encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 16, 0.0, batch_first=True), 1)
encoder.eval()
with torch.no_grad():
    model(ids), encoder(torch.ones(2, 3, 16)), model(ids)
"""
    file = script(tmp_path, MODEL, DECODE, other)
    trace = record(tmp_path, "--", file)
    names = trace.table("models")["architecture"].to_pylist()
    assert names == ["Tiny", "TransformerEncoder"]
    assert trace.sql(
        "select model, count(*) n from steps group by all order by all"
    ).to_pylist() == [
        {"model": 0, "n": 5},
        {"model": 1, "n": 1},
    ]


def test_a_script_in_which_nothing_attends_is_told_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """
import torch
from torch import nn
net = nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1))
net(torch.ones(2, 4))
nn.CrossEntropyLoss()(torch.ones(2, 4), torch.zeros(2, dtype=torch.long))
"""
    out = tmp_path / "a.kvtrace"
    assert main(["record", "--out", str(out), "--strict", "--", script(tmp_path, text)]) == 0
    said = capsys.readouterr().err
    assert "no transformers model ran, and no other PyTorch module that was called attended" in said
    assert not out.exists()


def test_beside_a_model_of_transformers_only_such_are_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=2)

class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.block = LlamaForCausalLM(config).eval(), Block()

    def forward(self, ids):
        return self.block(self.inner.model(ids).last_hidden_state)

with torch.no_grad():
    Wrapper()(torch.tensor([[3, 4, 5]]))
    model(torch.tensor([[3, 4, 5, 6]]))
"""
    trace = record(tmp_path, "--", script(tmp_path, MODEL, text))
    assert trace.table("models")["architecture"].to_pylist() == ["LlamaModel"]
    assert trace.rows == 3
    assert "plain PyTorch" not in capsys.readouterr().err


def test_a_model_that_raises_before_it_attends_is_none(tmp_path: Path) -> None:
    text = """
for given in ("no ids", ids):
    try:
        model(given)
    except TypeError:
        print("as without")
"""
    trace = record(tmp_path, "--", script(tmp_path, MODEL, DECODE, text))
    phases = [step["phase"] for step in trace.table("steps").to_pylist()]
    assert phases == [*["prefill"] * 3, "train"]


def test_a_compiled_model_is_found(tmp_path: Path) -> None:
    text = """
compiled = torch.compile(model, backend="aot_eager")
with torch.no_grad():
    for _ in range(2):
        compiled(torch.tensor([[3, 4, 5]]))
"""
    trace = record(tmp_path, "--", script(tmp_path, MODEL, text))
    assert trace.rows == 2 * 3
    assert trace.table("models").num_rows == 1
