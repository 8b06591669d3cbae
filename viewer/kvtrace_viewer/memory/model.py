"""How much memory a model's KV cache takes, and what fits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import kvtrace
from kvtrace.errors import InputError, KvtraceError
from kvtrace_viewer.memory.layers import LayerCache, kv_layers, text_config

#: Bytes of a number, by the names that configurations and serving engines give types.
DTYPES = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "int4": 0.5,
    "int2": 0.25,
}
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "auto": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class ModelMemory:
    """A model's KV cache, by arithmetic.

    Attributes
    ----------
    name : str
        For people.
    layers : tuple of LayerCache
        Attention layers that keep something.
    dtype : str
        `DTYPES`, of the cache.
    parameters : int or None
        None where neither the model nor the user says.
    weight_bytes : float
        Bytes of a parameter.
    """

    name: str
    layers: tuple[LayerCache, ...]
    dtype: str
    parameters: int | None = None
    weight_bytes: float = 2.0

    @property
    def bytes_per_token(self) -> float:
        """Bytes of a token's keys and values in all layers, while every layer holds it.

        Types below a byte count what their numbers take, without scales and zero points.
        """
        return sum(layer.values_per_token for layer in self.layers) * DTYPES[self.dtype]

    @property
    def weights(self) -> int | None:
        """Bytes of the parameters."""
        return None if self.parameters is None else int(self.parameters * self.weight_bytes)

    def cache_bytes(self, context: int, batch: int = 1) -> int:
        """Bytes of the cache once `batch` sequences of `context` tokens were processed."""
        held = sum(layer.values_per_token * layer.tokens(context) for layer in self.layers)
        return int(held * batch * DTYPES[self.dtype])

    def largest_context(self, room: int, batch: int = 1) -> int | None:
        """Tokens of the longest context whose cache fits into `room` bytes; None: any fits."""
        if self.cache_bytes(1 << 40, batch) <= room:
            return None
        low, high = 0, 1 << 40
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.cache_bytes(middle, batch) <= room else (low, middle)
        return low

    def largest_batch(self, room: int, context: int) -> int:
        """Sequences of `context` tokens whose cache fits into `room` bytes."""
        return max(room, 0) // max(self.cache_bytes(context), 1)


def shipped() -> list[str]:
    """Models that are known by name."""
    found = files(__package__).joinpath("models").iterdir()
    return sorted(one.name.removesuffix(".json") for one in found if one.name.endswith(".json"))


def read_model(name: str, dtype: str | None = None, parameters: int | None = None) -> ModelMemory:
    """Read a model: known by name, a trace, a config.json, or a directory with one.

    Parameters
    ----------
    name : str
        What is read; a trace gives the first model that it recorded.
    dtype : str, optional
        Type of the cache, such as fp8; the model's own by default.
    parameters : int, optional
        The model's own by default, where known.

    Raises
    ------
    InputError
        Where nothing of that name is found, it is no configuration, or the type is unknown.
    """
    config = _config(name)
    text = text_config(config)
    own = str(text.get("dtype") or text.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    chosen = _SHORT.get(dtype or own, dtype or own)
    if chosen not in DTYPES:
        raise InputError(
            f"type {chosen!r} is unknown; one of {', '.join(DTYPES)} was expected; give another"
            " --dtype"
        )
    known = parameters or config.get("num_parameters")
    return ModelMemory(
        name=name,
        layers=tuple(kv_layers(config)),
        dtype=chosen,
        parameters=int(known) if known else None,
        weight_bytes=DTYPES.get(_SHORT.get(own, own), 2.0),
    )


def _config(name: str) -> dict[str, Any]:
    if name.lower() in shipped():
        return _parsed(
            name, files(__package__).joinpath("models", f"{name.lower()}.json").read_text()
        )
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        return _of_trace(name)
    try:
        return _parsed(name, (path / "config.json" if path.is_dir() else path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{name} cannot be read ({error}); a config.json, a model's directory, a trace or one"
            f" of {', '.join(shipped())} was expected; see kvtrace memory --help"
        ) from error


def _of_trace(name: str) -> dict[str, Any]:
    try:
        rows = kvtrace.open(name).table("models").to_pylist()
    except KvtraceError as error:
        raise InputError(
            f"{name} is neither a model's directory nor a trace ({error}); one of them was"
            " expected; see kvtrace memory --help"
        ) from error
    if not rows or not rows[0]["config"]:
        raise InputError(f"{name} recorded no model's configuration; give its config.json instead")
    config = _parsed(name, rows[0]["config"])
    # What the model ran in, which a configuration may not say.
    return config | {"dtype": rows[0]["dtype"], "num_parameters": rows[0]["num_parameters"]}


def _parsed(name: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{name} is no JSON ({error}); a config.json was expected") from error
    if not isinstance(found, dict):
        raise InputError(f"{name} holds no object; a config.json was expected")
    return found
