"""Rotary positions: what a model's configuration says keys and queries were turned by.

RoFormer (Su et al. 2021, arXiv:2104.09864); NTK-by-parts scaling is YaRN's (Peng et al. 2023,
arXiv:2309.00071), "llama3" that of Llama 3.1. A turn is linear in the position, so that what was
turned by its position can be turned on to any other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace.model import Layer
from kvtrace.trace import Trace

Doubles = NDArray[np.float64]

#: Families of transformers that rotate neighbouring dimensions instead of the two halves.
INTERLEAVED = frozenset(
    {"blt", "codegen", "cohere", "cohere2", "cohere2_moe", "deepseek_v2", "deepseek_v4"}
    | {"ernie4_5", "ernie4_5_moe", "glm", "glm4", "gptj", "helium", "llama4", "moonshine"}
)

#: Families whose layers without a window have no positions at all, where others have a window.
ONLY_SLIDING = frozenset({"cohere2", "cohere2_moe", "exaone4", "exaone4_5", "exaone_moe", "flint"})

TOLERANCE = 0.05
"""A turned-back key of one token is this near that of the same token elsewhere; 16-bit rounding
leaves 0.01, another base or another pairing of dimensions 0.5 and more."""
PAIRS = 256


@dataclass(frozen=True, eq=False)
class Rope:
    """How a layer turns its queries and keys.

    Attributes
    ----------
    inv_freq : float64 [pair]
        Radians per position of each pair of dimensions; empty where the layer has no positions.
    is_interleaved : bool
        Pairs are (2i, 2i + 1), else (i, i + len(inv_freq)). Dimensions behind are not turned.
    """

    inv_freq: Doubles
    is_interleaved: bool = False

    @property
    def width(self) -> int:
        """Dimensions that are turned: the first."""
        return 2 * len(self.inv_freq)

    def split(self, vectors: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """First and second of each pair [..., pair], and the dimensions that are not turned."""
        turned, rest = vectors[..., : self.width], vectors[..., self.width :]
        if self.is_interleaved:
            return turned[..., 0::2], turned[..., 1::2], rest
        half = len(self.inv_freq)
        return turned[..., :half], turned[..., half:], rest

    def turn(self, vectors: NDArray[Any], by: NDArray[Any]) -> Doubles:
        """Turn `vectors` [token, ..., head_dim] on by `by` [token] positions; below 0, back."""
        angles = np.multiply.outer(by.astype(np.float64), self.inv_freq)
        angles = angles.reshape(len(angles), *[1] * (vectors.ndim - 2), -1)
        cos, sin = np.cos(angles), np.sin(angles)
        first, second, _ = self.split(vectors.astype(np.float64))
        found = vectors.astype(np.float64)
        a, b, _ = self.split(found)
        a[...], b[...] = first * cos - second * sin, second * cos + first * sin
        return found


def ropes(trace: Trace, layers: Sequence[Layer]) -> dict[int, Rope] | str:
    """How each layer turns its keys, by its number; or, in words, why that is not known."""
    texts = {row["model"]: row["config"] for row in trace.table("models").to_pylist()}
    found = {}
    for spec in layers:
        rope = rope_of(json.loads(texts[spec.model] or "{}"), spec)
        if isinstance(rope, str):
            return rope
        found[spec.layer] = rope
    return found


def rope_of(config: Mapping[str, Any], spec: Layer) -> Rope | str:
    """How a layer of a model of this configuration turns its keys; or why that is not known."""
    config = config.get("text_config") or config
    if spec.alibi_slopes is not None:
        return (
            f"layer {spec.layer} has ALiBi, whose distances are in its scores and not in its keys"
        )
    # GPT-J and CodeGen have no base of their own to choose.
    theta = spec.rope_theta or (10_000.0 if config.get("rotary_dim") else None)
    if theta is None:
        return f"layer {spec.layer} has no rotary positions (rope_theta)"
    if config.get("kv_lora_rank"):
        return "its keys are made from latents (MLA), of which a part is rotated by itself"
    if not _has_positions(config, spec):
        return Rope(np.empty(0))
    given = _parameters(config, spec)
    share = {**config, **given}.get("partial_rotary_factor")
    width = config.get("rotary_dim") or int(spec.head_dim * (1.0 if share is None else share))
    plain = theta ** -(np.arange(0, width, 2) / width)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _SCALED:
        return f"its RoPE is scaled by {kind}, whose frequencies change with the length"
    length = given.get("original_max_position_embeddings") or config.get("max_position_embeddings")
    inv_freq = _SCALED[kind](plain, theta, given, float(length or 0))
    return Rope(inv_freq, str(config.get("model_type", "")) in INTERLEAVED)


def rope_error(rope: Rope, keys: NDArray[np.float32], ids: NDArray[np.int64]) -> float | None:
    """How far layer 0's keys of equal tokens are apart once turned back; None: no token twice.

    There a key depends on its token and its position alone, so that the right turn leaves equal
    vectors: a test on the recorded run of everything that `rope_of` took from the configuration.

    Parameters
    ----------
    keys : float32 [token, kv_head, head_dim]
    ids : int64 [token]

    Returns
    -------
    float or None
        Median of ||a - b|| / ||a|| over at most 256 pairs of neighbouring occurrences.
    """
    order = np.argsort(ids, kind="stable")
    same = np.flatnonzero(ids[order][1:] == ids[order][:-1])
    same = same[np.unique(np.linspace(0, len(same) - 1, PAIRS).astype(int))] if len(same) else same
    if not len(same):
        return None
    first, second = order[same], order[same + 1]
    a, b = (rope.turn(keys[at], -at) for at in (first, second))
    sizes = np.linalg.norm(a, axis=(1, 2))
    apart = np.linalg.norm(a - b, axis=(1, 2))[sizes > 0] / sizes[sizes > 0]
    return float(np.median(apart)) if len(apart) else None


def _has_positions(config: Mapping[str, Any], spec: Layer) -> bool:
    """Whether a layer of a model with rotary positions uses them."""
    used = config.get("no_rope_layers")
    if used and spec.layer < len(used):
        return bool(used[spec.layer])  # its name notwithstanding, 1 says that they are used
    if config.get("model_type") in ONLY_SLIDING and config.get("sliding_window") is not None:
        return spec.sliding_window is not None
    return True


def _parameters(config: Mapping[str, Any], spec: Layer) -> dict[str, Any]:
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    by_kind = {name: one for name, one in found.items() if isinstance(one, dict)}
    if by_kind:
        kind = "full_attention" if spec.sliding_window is None else "sliding_attention"
        found = by_kind.get(kind) or next(iter(by_kind.values()))
    return dict(found)


def _plain(plain: Doubles, theta: float, given: Mapping[str, Any], length: float) -> Doubles:
    return plain


def _linear(plain: Doubles, theta: float, given: Mapping[str, Any], length: float) -> Doubles:
    return np.asarray(plain / given["factor"])


def _llama3(plain: Doubles, theta: float, given: Mapping[str, Any], length: float) -> Doubles:
    """Long waves are stretched, short ones left, those between in part."""
    low, high = given["low_freq_factor"], given["high_freq_factor"]
    turns = length * plain / (2 * math.pi)  # of the length the model was first trained on
    left = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(left * plain + (1 - left) * plain / given["factor"])


def _yarn(plain: Doubles, theta: float, given: Mapping[str, Any], length: float) -> Doubles:
    """The same with a ramp over the dimensions, between two numbers of turns."""
    width = 2 * len(plain)
    fast, slow = given.get("beta_fast") or 32, given.get("beta_slow") or 1
    low, high = (
        width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (fast, slow)
    )
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    stretched = np.clip((np.arange(len(plain)) - low) / max(high - low, 0.001), 0, 1)
    return np.asarray((1 - stretched) * plain + stretched * plain / given["factor"])


_SCALED = {"default": _plain, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
