"""KV memory by arithmetic: from a model's configuration to bytes, contexts and batches. Headless.

>>> from kvtrace_viewer.memory import read_model
>>> read_model("llama-3-8b").bytes_per_token
131072
"""

from kvtrace_viewer.memory.layers import LayerCache, kv_layers
from kvtrace_viewer.memory.model import ModelMemory, read_model, shipped

__all__ = ["LayerCache", "ModelMemory", "kv_layers", "read_model", "shipped"]
