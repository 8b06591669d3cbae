"""The replay, step by step in plain Python, written from the definitions (docs/policies.md).

One KV head, one policy, one budget. Slow on purpose: nothing is shared with the engine but the
attention rows it is given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.reference.naive_more import (
    ALLOCATE,
    CHOOSE,
    EVICT_NOTHING,
    MORE_PROTECTION,
    MORE_SCORES,
    STORED,
)
from tests.reference.scores import Scores

Array = NDArray[Any]


@dataclass
class Naive:
    """What one policy does in one head."""

    evicted_at: dict[int, int] = field(default_factory=dict)  # position -> row, policy or window
    evictions: int = 0
    mass: dict[int, list[float]] = field(default_factory=dict)  # row -> per query head
    hits: dict[int, int] = field(default_factory=dict)
    misses: dict[int, int] = field(default_factory=dict)
    held: dict[int, list[int]] = field(default_factory=dict)  # after each row
    cuts: list[int] = field(default_factory=list)
    ties: int = 0
    bound: float | None = None


def same(limit: int, present: int) -> int:
    """Stored is what the budget says."""
    return limit


def budget_of(text: str, present: int) -> int:
    """N, or max(1, floor(present * P / 100))."""
    if text.endswith("%"):
        return max(1, present * int(text[:-1]) // 100)
    return int(text)


def cut_rows(when: str, tokens: int, prompt: int) -> list[int]:
    """Rows after which there is a cut."""
    if when == "stream":
        return list(range(tokens))
    if when.startswith("chunk="):
        size = int(when.removeprefix("chunk="))
        return [i for i in range(prompt) if (i + 1) % size == 0 or i == prompt - 1]
    if when.startswith("every="):
        step = int(when.removeprefix("every="))
        return [i for i in range(prompt, tokens) if (i - prompt + 1) % step == 0]
    rows = [prompt - 1] if prompt else []
    return rows + list(range(prompt, tokens)) if when == "step" else rows


def replay(
    a: Array,
    policy: str,
    budget: str,
    when: str,
    prompt: int,
    *,
    sinks: int = 0,
    recent: str = "0",
    window: int | None = None,
    sink_share: Array | None = None,
    head: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
) -> Naive:
    """Replay one head.

    Parameters
    ----------
    a : [query head, row, key]
        Post-softmax attention, zero where a key is not visible.
    policy, budget, when : str
        As a user writes them, parameters apart.
    prompt : int
        Tokens of the prompt.
    sinks, recent : protection
    window : keys the model itself sees
    sink_share : [query head, row], what a learned sink takes
    head : k, v [token, d]; `layer`, the maps of all KV heads of the layer, with `layer_shares`,
        what learned sinks take of them
    options : the policy's own parameters
    """
    (found,) = replay_layer(
        [a],
        policy,
        budget,
        when,
        prompt,
        sinks=sinks,
        recent=recent,
        window=window,
        sink_shares=[sink_share],
        heads=[head or {}],
        options=options,
    )
    return found


@dataclass
class _Head:
    """One head on its way."""

    a: Array
    score: Any
    out: Naive
    kept: list[int] = field(default_factory=list)


def replay_layer(
    maps: list[Array],
    policy: str,
    budget: str,
    when: str,
    prompt: int,
    *,
    sinks: int = 0,
    recent: str = "0",
    window: int | None = None,
    sink_shares: list[Array | None],
    heads: list[dict[str, Any]],
    options: dict[str, Any] | None = None,
) -> list[Naive]:
    """Replay the heads of a layer, which may share a budget; arguments by head as of `replay`."""
    tokens = maps[0].shape[1]
    cuts = cut_rows(when, tokens, prompt)
    running = []
    for a, share, head in zip(maps, sink_shares, heads, strict=True):
        outside = np.zeros(a.shape[:2]) if share is None else share
        arguments = (outside, budget, cuts, window, head, options or {})
        score = SCORES[policy](a.astype(np.float64), *arguments)
        running.append(_Head(a.astype(np.float64), score, Naive(cuts=cuts, bound=score.bound)))
    measured_from = cuts[0] + 1 if cuts else tokens
    for i in range(tokens):
        present = i + 1 if window is None else min(i + 1, max(window - 1, 1))
        for one in running:
            one.kept.append(i)
            if i >= measured_from:
                before = i if window is None else min(i, max(window - 1, 1))
                read = one.score.read(i, one.kept[:-1], budget_of(budget, max(before, 1)))
                _measure(one.out, one.a, [*dict.fromkeys([*read, i])], i)
            one.score.update(i, one.kept)
            for j in [j for j in one.kept if window is not None and j <= i + 1 - window]:
                one.kept.remove(j)
                one.out.evicted_at[j] = i
        if i in cuts and policy not in EVICT_NOTHING:
            limit = budget_of(budget, present)
            _cut(running, i, STORED.get(policy, same)(limit, present), sinks, recent, policy)
        for one in running:
            one.out.held[i] = list(one.kept)
    return [one.out for one in running]


def _measure(out: Naive, a: Array, read: list[int], i: int) -> None:
    row = a[:, i, : i + 1]
    needed = row >= 1 / (i + 1)
    out.mass[i] = row[:, read].sum(axis=1).tolist()
    out.hits[i] = int(needed[:, read].sum())
    out.misses[i] = int(needed.sum()) - out.hits[i]


def _cut(running: list[_Head], i: int, limit: int, sinks: int, recent: str, policy: str) -> None:
    limits = [limit] * len(running)
    first = min(sinks, limit)
    wanted = limit * int(recent[:-1]) // 100 if recent.endswith("%") else int(recent)
    last = min(wanted, limit - first)
    if sum(len(one.kept) for one in running) <= sum(limits) and policy in ALLOCATE:
        return
    if any(len(one.kept) > limit for one in running):
        for one in running:
            if policy in ALLOCATE or len(one.kept) > limit:
                one.score.before_cut(i, one.kept, limit)
        if policy in ALLOCATE:
            scores = [
                {j: math.inf if j < first or j > i - last else one.score.of(i, j) for j in one.kept}
                for one in running
            ]
            limits = ALLOCATE[policy](scores, limit, running[0].score.options)
        if policy in CHOOSE:
            kept = running[0].kept
            fixed = [j for j in kept if j < first or j > i - last]
            scores = [{j: one.score.of(i, j) for j in kept} for one in running]
            chosen = CHOOSE[policy](scores, limit, fixed, running[0].score.options)
            limits = [len(chosen)] * len(running)
            for one in running:
                one.score.score = {j: float(j in chosen) for j in one.kept}
    for one, allotted in zip(running, limits, strict=True):
        if len(one.kept) > allotted:
            kept_first = min(first, allotted)
            kept_last = min(last, allotted - kept_first)
            left = one.score.left(len(one.kept), allotted, i == one.out.cuts[0])
            _cut_head(one, i, max(left, kept_first + kept_last), kept_first, kept_last)


def _cut_head(one: _Head, i: int, limit: int, first: int, last: int) -> None:
    out, score, kept = one.out, one.score, one.kept
    surplus = len(kept) - limit
    candidates = [j for j in kept if j >= first and j <= i - last]
    ranked = sorted(candidates, key=lambda j: (score.of(i, j), j))  # equal: the older first
    for j in ranked[:surplus]:
        kept.remove(j)
        out.evicted_at[j] = i
        out.evictions += 1
    if surplus < len(ranked) and score.of(i, ranked[surplus - 1]) == score.of(i, ranked[surplus]):
        out.ties += 1


class Youngest(Scores):
    """full, sliding_window, streaming_llm."""

    def of(self, i: int, j: int) -> float:
        return j


class LastNeeded(Scores):
    """lru."""

    def start(self) -> None:
        self.last = list(range(self.tokens))

    def update(self, i: int, kept: list[int]) -> None:
        for j in range(i + 1):
            if any(self.a[g, i, j] >= 1 / (i + 1) for g in range(self.group)):
                self.last[j] = i

    def of(self, i: int, j: int) -> float:
        return self.last[j]


class Accumulated(Scores):
    """h2o."""

    def start(self) -> None:
        self.sums = [0.0] * self.tokens

    def update(self, i: int, kept: list[int]) -> None:
        renormalise = self.options.get("renormalise", True)
        for g in range(self.group):
            total = 1.0
            if renormalise:
                total = sum(self.a[g, i, j] for j in kept) + self.outside[g, i]
            for j in kept if renormalise else range(i + 1):
                self.sums[j] += self.a[g, i, j] / total

    def of(self, i: int, j: int) -> float:
        return self.sums[j]


class Future(Scores):
    """oracle: prices, values backwards, the dual."""

    def start(self) -> None:
        if not self.cuts:
            return
        prices = np.geomspace(0.01, 40, self.options.get("prices", 16)) * self.group
        if len(self.cuts) == 1:
            prices = np.zeros(1)
        duals = [self.solve(price) for price in prices]
        self.bound = min(dual for dual, _ in duals)
        self.values = duals[int(np.argmin([dual for dual, _ in duals]))][1]

    def solve(self, price: float) -> tuple[float, dict[int, list[float]]]:
        """The dual sum, and the values after each cut."""
        received = self.a.sum(axis=0)
        cuts, first = set(self.cuts), self.cuts[0]
        value = [0.0] * self.tokens
        at_cut: dict[int, list[float]] = {}
        dual = 0.0
        for i in range(self.tokens - 1, first - 1, -1):
            if i in cuts:
                value[: i + 1] = [max(v, 0.0) for v in value[: i + 1]]
                at_cut[i] = list(value)
            if i == first:
                break
            last_cut = max(c for c in cuts if c < i)
            present = last_cut + 1
            if self.window is not None:
                present = min(present, max(self.window - 1, 1))
            dual += received[i, i]
            dual += price / (i + 1) * min(budget_of(self.budget, present), last_cut + 1)
            for j in range(i):
                value[j] += received[i, j] - (price / (i + 1) if j <= last_cut else 0)
            dual += value[i]
        present = first + 1
        if self.window is not None:
            present = min(present, max(self.window - 1, 1))
        best = sorted(at_cut[first][: first + 1], reverse=True)
        return dual + sum(best[: budget_of(self.budget, present)]), at_cut

    def of(self, i: int, j: int) -> float:
        return self.values[i][j]


class Drawn(Scores):
    """random: the same stream of draws, one for each token at each decision."""

    def start(self) -> None:
        self.stream = np.random.default_rng([self.options.get("seed", 0), *self.head["where"]])

    def update(self, i: int, kept: list[int]) -> None:
        if i in self.cuts:
            self.draws = self.stream.random(i + 1)

    def of(self, i: int, j: int) -> float:
        return float(self.draws[j])


class TimesNeeded(Scores):
    """lfu."""

    def start(self) -> None:
        self.times = [0] * self.tokens

    def update(self, i: int, kept: list[int]) -> None:
        for j in range(i + 1):
            self.times[j] += sum(self.a[g, i, j] >= 1 / (i + 1) for g in range(self.group))

    def of(self, i: int, j: int) -> float:
        return self.times[j]


class MeanReceived(Scores):
    """observed_attention."""

    def start(self) -> None:
        self.received = [0.0] * self.tokens

    def update(self, i: int, kept: list[int]) -> None:
        for j in range(i + 1):
            self.received[j] += float(self.a[:, i, j].sum())

    def of(self, i: int, j: int) -> float:
        first = i + 1 if self.window is None else min(i + 1, j + self.window)
        return float(self.received[j] / (first - j) / self.group)


class LastRow(Scores):
    """tova."""

    def before_cut(self, i: int, kept: list[int], limit: int) -> None:
        self.mean = dict.fromkeys(kept, 0.0)
        heads = 0
        for a, share in zip(self.head["layer"], self.head["layer_shares"], strict=True):
            for g in range(len(a)):
                heads += 1
                total = sum(float(a[g, i, j]) for j in kept) + share[g, i]
                for j in kept:
                    self.mean[j] += float(a[g, i, j]) / total
        self.mean = {j: value / heads for j, value in self.mean.items()}

    def of(self, i: int, j: int) -> float:
        return self.mean[j]


class WindowVotes(Scores):
    """snapkv, and pyramidkv where there is one layer."""

    def before_cut(self, i: int, kept: list[int], limit: int) -> None:
        window = self.options.get("window", 64)
        voted = max(i + 1 - window, 0)
        self.votes = self.a[:, voted : i + 1, :voted].sum(axis=1) / window

    def of(self, i: int, j: int) -> float:
        half = self.options.get("kernel", 5) // 2
        if j >= self.votes.shape[1]:
            return 0.0
        near = self.votes[:, max(j - half, 0) : j + half + 1]
        if self.options.get("pool", "avg") == "max":
            return float(near.max(axis=1).mean())
        return float((near.sum(axis=1) / (2 * half + 1)).mean())


class SmallKey(Scores):
    """knorm."""

    def of(self, i: int, j: int) -> float:
        key = self.head["k"][j].astype(np.float64)
        return -float(np.float32(math.sqrt((key**2).sum())))


class OddKey(Scores):
    """keydiff."""

    def before_cut(self, i: int, kept: list[int], limit: int) -> None:
        self.score = self.unlike_the_mean(kept)

    def unlike_the_mean(self, kept: list[int]) -> dict[int, float]:
        keys = {j: self.head["k"][j].astype(np.float64) for j in kept}
        unit = {j: key / math.sqrt((key**2).sum()) for j, key in keys.items()}
        mean = np.mean(list(unit.values()), axis=0)
        length = math.sqrt((mean**2).sum())
        return {j: -float(np.float32(u @ mean / length)) for j, u in unit.items()}

    def of(self, i: int, j: int) -> float:
        return self.score[j]


class OddKeyByBlocks(OddKey):
    """block_keydiff."""

    def before_cut(self, i: int, kept: list[int], limit: int) -> None:
        stay, rest = list(kept[:limit]), list(kept[limit:])
        block = self.options.get("block", 128)
        while rest:
            stay, rest = stay + rest[:block], rest[block:]
            score = self.unlike_the_mean(stay)
            stay = sorted(sorted(stay, key=lambda j: (score[j], j))[-limit:])
        self.score = {j: float(j in stay) for j in kept}


class Lagged(Scores):
    """lagkv."""

    def before_cut(self, i: int, kept: list[int], limit: int) -> None:
        sinks, lag = 4, self.options.get("lag", 128)
        parts = (i + 1 - sinks) // lag
        self.rank: dict[int, float] = dict.fromkeys(range(i + 1), 1.0)
        if parts < 2:
            self.rank = {j: float(j) for j in range(i + 1)}
        for part in range(parts - 1):
            own = range(sinks + part * lag, sinks + (part + 1) * lag)
            scores = np.zeros(lag)
            for name in "kv":
                vectors = self.head[name].astype(np.float64)
                after = vectors[own.stop : own.stop + lag]
                low, high = after.min(axis=0), after.max(axis=0)
                spread = [np.std((vectors[x] - low) / (high - low), ddof=1) for x in own]
                scores += np.exp(spread) / np.exp(spread).sum()
            for x in own:
                self.rank[x] = float((scores < scores[x - own.start]).sum()) / lag

    def of(self, i: int, j: int) -> float:
        return self.rank[j]


class Leverage(Scores):
    """cur."""

    def of(self, i: int, j: int) -> float:
        window = self.options.get("window", 16)
        first = j - j % window
        score = 1.0
        for name in "kv":
            part = self.head[name][first : min(first + window, i + 1)].astype(np.float64)
            energy = (part**2).sum(axis=1)
            score *= energy[j - first] / energy.sum()
        return score


SCORES: dict[str, type[Scores]] = {
    **MORE_SCORES,
    "full": Youngest,
    "sliding_window": Youngest,
    "streaming_llm": Youngest,
    "fifo": Youngest,
    "pinned_prefix": Youngest,
    "random": Drawn,
    "lru": LastNeeded,
    "lfu": TimesNeeded,
    "observed_attention": MeanReceived,
    "tova": LastRow,
    "snapkv": WindowVotes,
    "pyramidkv": WindowVotes,
    "knorm": SmallKey,
    "keydiff": OddKey,
    "block_keydiff": OddKeyByBlocks,
    "lagkv": Lagged,
    "cur": Leverage,
    "h2o": Accumulated,
    "oracle": Future,
}
PROTECTION: dict[str, dict[str, Any]] = {
    **MORE_PROTECTION,
    "streaming_llm": {"sinks": 4},
    "pinned_prefix": {"sinks": 32},
    "h2o": {"recent": "50%"},
    "tova": {"recent": "1"},
    "snapkv": {"recent": "64"},
    "pyramidkv": {"recent": "64"},
    "lagkv": {"sinks": 4},
    "cur": {"sinks": 4},
}
"""What the policies protect by default."""
