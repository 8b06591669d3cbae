"""What each layer of a model keeps for a token, from transformers' configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvtrace.errors import InputError

#: Kinds in `layer_types` that keep no keys and values.
_WITHOUT = {"linear_attention", "mamba", "conv", "recurrent", "short_conv", "moe", "mlp"}
_WINDOWED = {"sliding_attention", "chunked_attention", "local", "sliding"}


@dataclass(frozen=True)
class LayerCache:
    """What one attention layer keeps.

    Attributes
    ----------
    values_per_token : int
        Numbers that the keys and values of one token are.
    window : int or None
        Tokens that a query sees, itself included; None: all.
    """

    values_per_token: int
    window: int | None = None

    def tokens(self, context: int) -> int:
        """Tokens that the cache holds once `context` tokens were processed.

        Right after a prompt longer than the window, transformers' caches still hold all of it.
        """
        return context if self.window is None else min(context, self.window)


def kv_layers(config: Mapping[str, Any]) -> list[LayerCache]:
    """Read the attention layers of a configuration.

    Parameters
    ----------
    config : mapping
        `config.to_dict()`, config.json, or `models.config` of a trace. Of a model of several
        parts the text's is taken.

    Raises
    ------
    InputError
        Where the number of layers or heads is not in it.
    """
    config = text_config(config)
    count = _first(config, "num_hidden_layers", "n_layer", "num_layers", "n_layers")
    values = _values_per_token(config)
    window = config.get("sliding_window")
    if config.get("use_sliding_window") is False:
        window = None
    kinds = config.get("layer_types") or _kinds(config, count, window)
    return [
        LayerCache(values, int(window) if window and kind in _WINDOWED else None)
        for kind in kinds
        if kind not in _WITHOUT
    ]


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a configuration that describes the text decoder."""
    for name in ("text_config", "decoder", "llm_config"):
        if isinstance(config.get(name), Mapping):
            return text_config(config[name])
    return config


def _kinds(config: Mapping[str, Any], count: int, window: object) -> list[str]:
    """Kinds of layers of a configuration that does not list them."""
    pattern = config.get("sliding_window_pattern")
    if window and pattern:
        return ["full" if (n + 1) % int(pattern) == 0 else "sliding" for n in range(count)]
    first = config.get("max_window_layers") if config.get("use_sliding_window") else 0
    return ["full" if n < (first or 0) or not window else "sliding" for n in range(count)]


def _values_per_token(config: Mapping[str, Any]) -> int:
    heads = _first(config, "num_attention_heads", "n_head", "num_heads", "n_heads")
    if config.get("kv_lora_rank"):
        # Multi-head latent attention keeps the latent and one rotary key for all heads.
        return int(config["kv_lora_rank"]) + int(config["qk_rope_head_dim"])
    size = config.get("head_dim")
    if size is None:
        size = _first(config, "hidden_size", "n_embd", "d_model") // heads
    return 2 * _kv_heads(config, heads) * int(size)


def _kv_heads(config: Mapping[str, Any], heads: int) -> int:
    # Falcon's new architecture has num_kv_heads, its old one multi_query and no count that holds.
    # transformers' own Falcon keeps every KV head once for each of its query heads.
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 1
    if config.get("model_type") == "falcon" and not config.get("new_decoder_architecture"):
        return heads
    for name in ("num_key_value_heads", "num_kv_heads", "n_head_kv"):
        if config.get(name):
            return int(config[name])
    return heads


def _first(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if config.get(name) is not None:
            return int(config[name])
    raise InputError(
        f"the configuration has none of {', '.join(names)}; a transformers model's config.json was"
        " expected; give another model"
    )
