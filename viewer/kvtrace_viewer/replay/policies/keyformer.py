"""Key tokens by noised accumulation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.amounts import Amount, parse_amount
from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.jit import jit
from kvtrace_viewer.replay.policy import parameter
from kvtrace_viewer.replay.rowwise import RowByRow

THIRTY = parse_amount("30%", "recent", "recent=30%")


@dataclass
class Accumulated:
    """`sums` [token], `noise` [token], and the `temperature` [token] of each row."""

    sums: NDArray[np.float64]
    noise: NDArray[np.float64]
    temperature: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Keyformer(RowByRow):
    """Accumulate attention as h2o does, with Gumbel noise and a rising temperature.

    Adnan et al. 2024, "Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient
    Generative Inference", arXiv:2403.09054. Each row adds softmax((score + noise) / tau) over
    what is held; tau is `tau_start` over the prompt and rises linearly to `tau_end` at the last
    token. Deviations: every token's noise is drawn once, the same for all rows and query heads of
    the group, whose sums are added up; a real run is equalled only with the same draws.

    Signals: q, k, and the seed.
    """

    name: ClassVar[str] = "keyformer"

    recent: Amount = parameter(  # noqa: RUF009 (a dataclass field; an Amount never changes)
        THIRTY, "last tokens that are never evicted", "tokens or % of budget"
    )
    seed: int = parameter(0, "seed of the noise", "seed", 0)
    tau_start: float = parameter(1.0, "temperature over the prompt", "ratio", 0.01)
    tau_end: float = parameter(2.0, "temperature at the last decoded token", "ratio", 0.01)

    def memory(self, head: Head) -> Accumulated:
        """Draw the noise."""
        stream = np.random.default_rng([self.seed, head.layer, head.kv_head])
        decoded = np.maximum(np.arange(head.tokens) - head.prompt_tokens + 1, 0)
        risen = decoded / max(head.tokens - head.prompt_tokens, 1)
        temperature = self.tau_start + (self.tau_end - self.tau_start) * risen
        return Accumulated(np.zeros(head.tokens), stream.gumbel(size=head.tokens), temperature)

    def see_row(self, block: Block, row: int, held: NDArray[np.int64], memory: Accumulated) -> None:
        """Add the row."""
        r = row - block.start
        _add_noised(
            block.attention[:, r],
            block.sink_share[:, r],
            held,
            memory.noise,
            float(1 / memory.temperature[row]),
            memory.sums,
        )

    def score_row(
        self, held: NDArray[np.int64], row: int, memory: Accumulated
    ) -> NDArray[np.float64]:
        """Return the sums."""
        return memory.sums[held]


@jit
def _add_noised(
    attention: NDArray[np.float32],
    sink_share: NDArray[np.float64],
    held: NDArray[np.int64],
    noise: NDArray[np.float64],
    sharpness: float,
    sums: NDArray[np.float64],
) -> None:
    """Add softmax((score + noise) * sharpness) over what is held, from attention = exp(score)."""
    weights = np.empty(held.shape[0])
    for g in range(attention.shape[0]):
        total = sink_share[g] ** sharpness
        for s in range(held.shape[0]):
            weight = 0.0
            if attention[g, held[s]] > 0:
                score = np.log(np.float64(attention[g, held[s]])) + noise[held[s]]
                weight = np.exp(score * sharpness)
            weights[s] = weight
            total += weight
        if total > 0:
            for s in range(held.shape[0]):
                sums[held[s]] += weights[s] / total
