"""A model whose heads are split over two processes: recorded as two ranks, read as one."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import kvtrace
from kvtrace.commands.info import describe

PROGRAM = """\
import torch, torch.distributed as dist
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from kvtrace_recorder import record

split = DistributedConfig(tp_size=2)
model = AutoModelForCausalLM.from_pretrained("model", distributed_config=split)
with record(model, "run.kvtrace", dtype="float32"):
    model.generate(torch.arange(5, 12)[None], max_new_tokens=5, do_sample=False)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved Llama of random weights, 8 query heads and 4 KV heads, and the program."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    (tmp_path / "work.py").write_text(PROGRAM)
    return tmp_path


def run(folder: Path) -> kvtrace.Trace:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = str(bound.getsockname()[1])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "--master-port", port, "work.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return kvtrace.open(folder / "run.kvtrace")


def test_all_heads_are_those_of_the_whole_model(folder: Path) -> None:
    trace = run(folder)
    assert (trace.shards, trace.status) == ({1: 0}, "complete")
    (request,) = trace.requests()
    assert (request.tokens, trace.rows) == (11, 11)
    assert [(s.num_q_heads, s.num_kv_heads, s.kv_heads) for s in trace.layers] == [(8, 4, None)] * 2
    assert trace.table("gaps").num_rows == 0
    model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
    ids = torch.tensor(trace.tokens()["token_id"].to_pylist())[None]
    with torch.no_grad():
        expected = model(ids, output_attentions=True).attentions
    for layer in range(2):
        for head in range(8):
            found = trace.attention(layer, head)
            np.testing.assert_allclose(found, expected[layer][0, head].numpy(), atol=1e-4)
    alone = kvtrace.open(trace.path, rank=1)
    assert [layer.kv_head_numbers for layer in alone.layers] == [[2, 3]] * 2
    assert alone.layers[0].q_head_numbers == [4, 5, 6, 7]
    assert describe(alone)["heads"] == "KV heads 2-3 of the model's 4"
