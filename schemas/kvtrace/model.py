"""What a reader gets: layers, requests, and one layer's data of one request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace.errors import InputError


@dataclass(frozen=True)
class Layer:
    """An attention layer; fields are the columns of table `layers`."""

    model: int
    layer: int
    attention_kind: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    sliding_window: int | None
    softcap: float | None
    has_sinks: bool
    rope_theta: float | None
    array_group: int
    array_index: int
    name: str | None = None
    kv_heads: Sequence[int] | None = None
    alibi_slopes: Sequence[float] | None = None
    position_bias: Sequence[Sequence[float]] | None = None
    model_kv_heads: int | None = None

    @property
    def is_cross(self) -> bool:
        """Whether queries are the request's and keys its encoder's."""
        return self.attention_kind == "cross"

    @property
    def is_part(self) -> bool:
        """Whether only some of the model's heads are here."""
        return self.kv_heads is not None or self.model_kv_heads is not None

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def kv_head_numbers(self) -> list[int]:
        """The model's number of each KV head, in the order of the arrays."""
        return list(range(self.num_kv_heads) if self.kv_heads is None else self.kv_heads)

    @property
    def q_head_numbers(self) -> list[int]:
        """The model's number of each query head, in the order of the arrays."""
        size = self.group_size
        return [head * size + one for head in self.kv_head_numbers for one in range(size)]

    def q_head_index(self, head: int) -> int:
        """Where the model's query head `head` stands in the arrays.

        Raises
        ------
        InputError
            For a head that the trace does not hold.
        """
        try:
            return self.q_head_numbers.index(head)
        except ValueError:
            raise InputError(
                f"head {head} was not found in layer {self.layer}; it has"
                f" {number_text(self.q_head_numbers)}"
            ) from None


@dataclass(frozen=True)
class Request:
    """A sequence.

    Attributes
    ----------
    request : int
        Its number.
    model : int
        The model that ran it.
    tokens : int
        Tokens committed so far.
    prompt_tokens : int
        Tokens of the prompt.
    external_id : str or None
        The serving API's id.
    batch_index : int or None
        Row of the batch it ran in.
    started_ns : int
        Wall clock.
    encoder_request : int or None
        The request whose tokens its cross attention reads.
    """

    request: int
    model: int
    tokens: int
    prompt_tokens: int
    external_id: str | None
    batch_index: int | None
    started_ns: int
    encoder_request: int | None = None


@dataclass(frozen=True)
class LayerData:
    """One layer of one request, by position; float32, None where not recorded.

    Of a cross layer q and lse are by position in the request, k, v and received by position in
    its encoder's request.

    Attributes
    ----------
    spec : Layer
        The layer.
    q : numpy.ndarray or None
        [token, q_head, head_dim]
    k : numpy.ndarray or None
        [token, kv_head, head_dim]
    v : numpy.ndarray or None
        [token, kv_head, value_dim]
    lse : numpy.ndarray or None
        [token, q_head]; NaN, like q, for tokens whose query was not kept.
    received : numpy.ndarray or None
        [token, q_head], attention that the prompt's tokens received from all of the prompt's
        queries; NaN behind the prompt.
    """

    spec: Layer
    q: NDArray[np.float32] | None
    k: NDArray[np.float32] | None
    v: NDArray[np.float32] | None
    lse: NDArray[np.float32] | None
    received: NDArray[np.float32] | None = None

    @property
    def n(self) -> int:
        """Tokens."""
        found: Any = next((x for x in (self.k, self.q, self.v) if x is not None), ())
        return len(found)


def number_text(numbers: Sequence[int]) -> str:
    """Ascending numbers as `--layers` and `--heads` take them: "0,4-7"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts) or "none"
