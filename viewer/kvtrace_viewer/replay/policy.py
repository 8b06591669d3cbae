"""What a policy is: a dataclass with one scoring method."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.amounts import Amount, Budget, parse_amount
from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.cache import Cache, Cuts, present
from kvtrace_viewer.replay.when import When

NONE = Amount(0, None, "0")


def parameter(default: Any, text: str, unit: str = "", least: float | None = None) -> Any:
    """Declare a policy's parameter: its default, what it does, its unit, its least value."""
    return field(default=default, metadata={"help": text, "unit": unit, "least": least})


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Which tokens a KV cache drops when it is full.

    A policy is one file with one dataclass derived from this one. Its first docstring line is
    its idea and is shown to users; its fields, made with `parameter`, are what `--policy
    name:key=value` takes. It is asked per layer and KV head, and most policies define only
    `scores`. A policy keeps nothing in itself: what it must remember between blocks is the
    state that `start` returns, one per head.

    Where a budget is smaller than its protection, the first tokens are protected first, then
    the last ones, up to the budget.
    """

    sinks: int = parameter(0, "first tokens that are never evicted", "tokens", 0)
    recent: Amount = parameter(  # noqa: RUF009 (a dataclass field; an Amount never changes)
        NONE, "last tokens that are never evicted", "tokens or % of budget"
    )

    name: ClassVar[str] = ""
    signals: ClassVar[frozenset[str]] = frozenset({"q", "k"})
    """What decides: of q, k, v. Empty: position alone, exact everywhere (E0)."""
    default_when: ClassVar[str] = "step"
    """When it decides in its paper."""
    across_heads: ClassVar[bool] = False
    """Whether it reads `Block.layer`, the rows of the other heads."""
    needs_held: ClassVar[bool] = False
    """Whether scores depend on what is held: then `score_held` is asked instead of `scores`."""
    takes_received: ClassVar[bool] = False
    """Whether `Head.received` can stand for the prompt's queries; see `Block.is_summed`."""
    looks_ahead: ClassVar[bool] = False
    """Whether the engine must call `look_ahead` for every block, last first, before the replay."""

    def __post_init__(self) -> None:
        recent = parse_amount(self.recent, f"recent of {self.name}", "recent=32 or recent=50%")
        object.__setattr__(self, "recent", recent)

    @property
    def prompt_queries(self) -> int | None:
        """Last queries of the prompt that decisions after it need; None: all of them."""
        return None if "q" in self.signals else 0

    def start(self, head: Head, cuts: Cuts) -> Any:
        """Return the state of one head before its first block; None where nothing is kept."""
        return None

    def scores(self, block: Block, cuts: Cuts, state: Any) -> NDArray[np.float64]:
        """Score every key at each decision of a block. Higher = kept.

        Called for every block in order, also where `cuts` is empty, so that `state` can be
        updated (in place).

        Returns
        -------
        float64 [cut, key], key running to block.stop, or [budget, cut, key]
            The scores after the row of each cut.
        """
        raise NotImplementedError

    def score_held(
        self, held: NDArray[np.int64], limit: int, row: int, block: Block, state: Any
    ) -> NDArray[np.float64]:
        """Score what one cache holds at the cut after `row`. Higher = kept.

        Parameters
        ----------
        held : int64 [held]
            Positions, ascending; there are more than `limit`.
        limit : int
            Tokens that will be left.

        Returns
        -------
        float64 [held]
        """
        raise NotImplementedError

    def decide(self, block: Block, cuts: Cuts, state: Any, cache: Cache) -> None:
        """Make the decisions of a block."""
        if not self.needs_held:
            cache.cut(cuts, self.scores(block, cuts, state))
            return
        for row in cuts.rows:
            one = cuts.within(row, row + 1)
            lines = np.zeros((one.limits.shape[1], 1, row + 1))
            for b, limit in enumerate(one.limits[0]):
                held = cache.held_before(int(row), b)
                if len(held) > limit:
                    lines[b, 0, held] = self.score_held(held, int(limit), int(row), block, state)
            cache.cut(one, lines)

    def look_ahead(self, block: Block, cuts: Cuts, state: Any) -> None:
        """See a block before the replay; called from the last block to the first."""

    def bound(self, block_state: Any) -> NDArray[np.float64] | None:
        """Upper bound [budget] on the attention any policy keeps in this head; None: unknown."""
        return None

    def limits(self, budget: Budget, rows: NDArray[np.int64], head: Head) -> NDArray[np.int64]:
        """Tokens held after a decision at each row, in this head.

        Policies that share a budget unevenly over layers or heads override this.
        """
        return budget.limits(present(rows, head.window))

    @property
    def least_recent(self) -> int:
        """Last tokens that the policy itself never evicts, whatever `recent` is."""
        return 0

    def cuts(self, when: When, budgets: list[Budget], head: Head) -> Cuts:
        """All decisions over a request, with protection clipped to the budget."""
        rows = when.cuts(head.tokens, head.prompt_tokens)
        limits = np.stack([self.limits(b, rows, head) for b in budgets], axis=1)
        sinks = np.minimum(self.sinks, limits)
        recent = np.maximum(self.recent.of(limits), self.least_recent)
        recent = np.minimum(recent, limits - sinks)
        return Cuts(rows, limits, sinks, recent)

    def exactness(self, when: When) -> str:
        """E0, E1 or E2: how far a replay equals a real run (docs/policies.md)."""
        if not self.signals:
            return "E0"
        return "E1" if when.kind == "prefill" else "E2"

    def parameters(self) -> dict[str, Any]:
        """Every parameter, defaults too, as plain values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: str(v) if isinstance(v, Amount) else v for k, v in values.items()}

    @property
    def spec(self) -> str:
        """The policy as `name:key=value,...`, defaults left out."""
        defaults = type(self)().parameters()
        given = [f"{k}={_text(v)}" for k, v in self.parameters().items() if v != defaults[k]]
        return self.name + (":" + ",".join(given) if given else "")


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
