"""What a policy is: a dataclass with one scoring method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.amounts import Amount, Budget, parse_amount
from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.cache import Cache, Cuts, Scores, present
from kvtrace_viewer.replay.checks import check_scores
from kvtrace_viewer.replay.sharing import ScoreHeld, cut_together
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

    Where one score per key is not enough, declare it and define one method more. Budgets that
    data decides: `limits` gives a head its own (from a table by `head.layer` and
    `head.kv_head`); `shares_heads` with `allocate` divides, at each decision, one budget among
    the heads of a layer; `surveys` with `survey` looks at every layer before the replay, and
    `limits` then reads `head.surveys[self.spec][layer]` of all layers. Whole sets at once:
    `decide`. Choosing per query what is read, without evicting: derive from `selector.Selector`
    and define `select`. Further signals, read or derived once and only where `signals` names
    them: `q_prerope` (`head.q_prerope` and `head.inv_freq`, see `signals.rotate`), `wo`
    (`head.wo`) and `score` (`head.score`, recorded with the tokens).
    """

    sinks: int = parameter(0, "first tokens that are never evicted", "tokens", 0)
    recent: Amount = parameter(  # noqa: RUF009 (a dataclass field; an Amount never changes)
        NONE, "last tokens that are never evicted", "tokens or % of budget"
    )

    name: ClassVar[str] = ""
    signals: ClassVar[frozenset[str]] = frozenset({"q", "k"})
    """What decides: of q, k, v, q_prerope, wo, score. Empty: position alone, exact (E0)."""
    default_when: ClassVar[str] = "step"
    """When it decides in its paper."""
    across_heads: ClassVar[bool] = False
    """Whether it reads `Block.layer`, the rows of the other heads."""
    needs_held: ClassVar[bool] = False
    """Whether scores depend on what is held: then `score_held` is asked instead of `scores`."""
    takes_received: ClassVar[bool] = False
    """Whether `Head.received` can stand for the prompt's queries; see `Block.is_summed`."""
    shares_heads: ClassVar[bool] = False
    """Whether the heads of a layer share a budget: then `allocate` is asked."""
    surveys: ClassVar[bool] = False
    """Whether `survey` must see every layer before the replay."""
    selects: ClassVar[bool] = False
    """Whether it chooses per query what is read; see `selector.Selector`."""
    looks_ahead: ClassVar[bool] = False
    """Whether the engine must call `look_ahead` for every block, last first, before the replay."""

    def __post_init__(self) -> None:
        recent = parse_amount(self.recent, f"recent of {self.name}", "recent=32 or recent=50%")
        object.__setattr__(self, "recent", recent)

    @property
    def prompt_queries(self) -> int | None:
        """Last queries of the prompt that decisions after it need; None: all of them."""
        return None if self.signals & {"q", "q_prerope"} else 0

    def start(self, head: Head, cuts: Cuts) -> Any:
        """Return the state of one head before its first block; None where nothing is kept."""
        return None

    def scores(self, block: Block, cuts: Cuts, state: Any) -> Scores:
        """Score every key at each decision of a block. Higher = kept.

        Called for every block in order, also where `cuts` is empty, so that `state` can be
        updated (in place).

        Returns
        -------
        float64 or float32 [cut, key], key running to block.stop, or [budget, cut, key]
            The scores after the row of each cut. float32 is compared in half the time.
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

    def see(self, block: Block, cuts: Cuts, state: Any) -> None:
        """See a block before its decisions, where `needs_held`: the place to update `state`."""

    def decide(self, block: Block, cuts: Cuts, state: Any, cache: Cache) -> None:
        """Make the decisions of a block."""
        if not self.needs_held:
            cache.cut(cuts, self._checked_scores(block, cuts, state))
            return
        self.see(block, cuts, state)
        for row in cuts.rows:
            one = cuts.within(row, row + 1)
            lines = np.zeros((one.limits.shape[1], 1, row + 1))
            for b, limit in enumerate(one.limits[0]):
                held = cache.held_before(int(row), b)
                if len(held) > limit:
                    lines[b, 0, held] = self._checked_held(held, int(limit), row, block, state)
            cache.cut(one, lines)

    def decide_layer(
        self,
        blocks: Sequence[Block],
        cuts: Sequence[Cuts],
        states: Sequence[Any],
        caches: Sequence[Cache],
    ) -> None:
        """Make the decisions of a block in all heads of a layer, where `shares_heads`."""
        score_held = self.layer_scores(blocks, cuts, states)
        cut_together(cuts, caches, blocks[0].stop, score_held, self.allocate)

    def layer_scores(
        self, blocks: Sequence[Block], cuts: Sequence[Cuts], states: Sequence[Any]
    ) -> ScoreHeld:
        """Return what scores held tokens by (head, cut, budget, held, limit), where shared."""
        if self.needs_held:
            for one in zip(blocks, cuts, states, strict=True):
                self.see(*one)
            return lambda h, c, b, held, limit: self._checked_held(
                held, limit, cuts[h].rows[c], blocks[h], states[h]
            )
        lines = list(map(self._checked_scores, blocks, cuts, states))
        return lambda h, c, b, held, limit: np.asarray(
            lines[h][c, held] if lines[h].ndim == 2 else lines[h][b % len(lines[h]), c, held]
        )

    def _checked_scores(self, block: Block, cuts: Cuts, state: Any) -> Scores:
        scores = self.scores(block, cuts, state)
        if not len(cuts.rows):
            return scores
        per_key = (len(cuts.rows), block.stop)
        shapes = (per_key, (1, *per_key), (cuts.limits.shape[1], *per_key))
        return check_scores(self, "scores", scores, cuts.rows, *dict.fromkeys(shapes))

    def _checked_held(
        self, held: NDArray[np.int64], limit: int, row: int, block: Block, state: Any
    ) -> NDArray[np.float64]:
        scores = self.score_held(held, limit, int(row), block, state)
        found = check_scores(self, "score_held", scores, np.array([row]), held.shape)
        return found.astype(np.float64, copy=False)

    def allocate(
        self, scores: list[NDArray[np.float64]], limits: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Divide one budget among the heads of a layer at one decision.

        Parameters
        ----------
        scores : list by head of float64 [held]
            What each head holds, ascending by position; infinite where protected.
        limits : int64 [head]
            An even division; together they hold fewer than `scores`.

        Returns
        -------
        int64 [head]
            Tokens each head is left with; no more in sum than `limits`.
        """
        raise NotImplementedError

    def survey(self, heads: Sequence[Head], cuts: NDArray[np.int64]) -> Any:
        """Look at one layer before the replay, where `surveys`; `cuts` [cut] are the rows."""
        raise NotImplementedError

    def look_ahead(self, block: Block, cuts: Cuts, state: Any) -> None:
        """See a block before the replay; called from the last block to the first."""

    def bound(self, block_state: Any) -> NDArray[np.float64] | None:
        """Upper bound [budget] on the attention any policy keeps in this head; None: unknown."""
        return None

    def foreseen(self, block_state: Any) -> Any:
        """Return a head's part of a bound over several (`bounds.Foreseen`); None: unknown."""
        return None

    @property
    def bound_scope(self) -> str | None:
        """Which bound holds for it: one of the oracle's, or what `top_k` retains.

        `head`: every KV head has the same budget. `layer`: the heads of a layer share theirs.
        `model`: `limits` gives heads or layers budgets of their own. `read`: every query chooses
        what it reads, of which `top_k` finds the best. None: what is kept is no matter of the
        budget alone.
        """
        if self.selects:
            return "read"
        if type(self).limits is not Policy.limits:
            return "model"
        return "layer" if self.shares_heads else "head"

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
        """E0, E1, E2 or E3: how far a replay equals a real run (docs/policies.md)."""
        if not self.signals:
            return "E0"
        if "score" in self.signals:
            return "E3"
        return "E1" if when.kind == "prefill" else "E2"

    def parameters(self) -> dict[str, Any]:
        """Every parameter, defaults too, as plain values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: str(v) if isinstance(v, Amount) else v for k, v in values.items()}

    def defaults(self) -> dict[str, Any]:
        """As `parameters`, of the same policy where nothing is given."""
        return type(self)().parameters()

    @property
    def spec(self) -> str:
        """The policy as `name:key=value,...`, defaults left out."""
        defaults = self.defaults()
        given = [f"{k}={_text(v)}" for k, v in self.parameters().items() if v != defaults.get(k)]
        return self.name + (":" + ",".join(given) if given else "")


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
