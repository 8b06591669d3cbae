"""More policies of the naive replay, written from the papers (see each policy's file)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from tests.reference.scores import Array, Scores

EVICT_NOTHING = {"full", "recent_n", "quest", "top_k"}


class Unimportant(Scores):
    """scissorhands: how often, in the last rows, a token got less than the mean."""

    def start(self) -> None:
        self.rows: list[dict[int, int]] = []

    def update(self, i: int, kept: list[int]) -> None:
        counts = dict.fromkeys(kept, 0)
        for g in range(self.group):
            mean = (sum(self.a[g, i, j] for j in kept) + self.outside[g, i]) / len(kept)
            for j in kept:
                counts[j] += int(self.a[g, i, j] < mean)
        self.rows = [*self.rows, counts][-self.options.get("history", 400) :]

    def left(self, held: int, limit: int, is_first: bool) -> int:
        drop = limit * int(self.options.get("drop", "50%")[:-1]) // 100
        return limit if is_first else max(1, min(limit, held - drop))

    def of(self, i: int, j: int) -> float:
        return -sum(row.get(j, 0) for row in self.rows)


class Noised(Scores):
    """keyformer."""

    def start(self) -> None:
        stream = np.random.default_rng([self.options.get("seed", 0), *self.head["where"]])
        self.noise = [stream.gumbel() for _ in range(self.tokens)]
        self.sums = [0.0] * self.tokens

    def update(self, i: int, kept: list[int]) -> None:
        prompt = self.head["prompt"]
        tau = 1.0 + max(0, i - prompt + 1) / max(self.tokens - prompt, 1)
        for g in range(self.group):
            weights = {
                j: math.exp((math.log(self.a[g, i, j]) + self.noise[j]) / tau)
                for j in kept
                if self.a[g, i, j] > 0
            }
            total = sum(weights.values()) + self.outside[g, i] ** (1 / tau)
            for j, weight in weights.items():
                self.sums[j] += weight / total

    def of(self, i: int, j: int) -> float:
        return self.sums[j]


class OutputChange(Scores):
    """caote: recompute the output without each token."""

    def before_cut(self, i: int, kept: list[int], limit: int) -> None:
        v = self.head["v"].astype(np.float64)
        self.change = dict.fromkeys(kept, 0.0)
        for g in range(self.group):
            total = sum(self.a[g, i, j] for j in kept) + self.outside[g, i]
            share = {j: self.a[g, i, j] / total for j in kept}
            output = sum(share[j] * v[j] for j in kept)
            for j in kept:
                without = (output - share[j] * v[j]) / max(1 - share[j], 1e-12)
                self.change[j] += float(np.linalg.norm(without - output)) / self.group

    def of(self, i: int, j: int) -> float:
        return round(self.change[j], 12)


class Drawn(Scores):
    """nacl."""

    def before_cut(self, i: int, kept: list[int], limit: int) -> None:
        proxies = self.options.get("proxies", 64)
        first = max(i + 1 - proxies, 0)
        sums = {j: float(self.a[:, first : i + 1, j].sum()) / self.group for j in kept}
        seed = [self.options.get("seed", 0), *self.head["where"], i]
        noise: Array = np.random.default_rng(seed).gumbel(size=i + 1)
        free = [j for j in kept if j <= i - min(proxies, limit)]
        best = max(limit - limit * 30 // 100 - (len(kept) - len(free)), 0)
        ranked = sorted(free, key=lambda j: (sums[j], j), reverse=True)
        self.score: dict[int, float] = {j: sums[j] + float(noise[j]) for j in kept}
        self.score |= dict.fromkeys(ranked[:best], math.inf)

    def of(self, i: int, j: int) -> float:
        return self.score[j]


class Irredundant(Scores):
    """r_kv."""

    def before_cut(self, i: int, kept: list[int], limit: int) -> None:
        window, half = 8, 3
        rows = range(max(i + 1 - window, 0), i + 1)
        mean = dict.fromkeys(kept, 0.0)
        for r in rows:
            totals = [sum(self.a[g, r, j] for j in kept) for g in range(self.group)]
            for j in kept:
                shares = [self.a[g, r, j] / t for g, t in enumerate(totals) if t > 0]
                mean[j] += max(shares, default=0.0) / len(rows)
        redundant = self.redundancy(kept)
        self.score = {}
        for at, j in enumerate(kept):
            pooled = max(mean[n] for n in kept[max(at - half, 0) : at + half + 1])
            self.score[j] = 0.07 * pooled - 0.93 * redundant[j]

    def redundancy(self, kept: list[int]) -> dict[int, float]:
        k = {j: self.head["k"][j].astype(np.float64) for j in kept}
        unit = {j: key / np.linalg.norm(key) for j, key in k.items()}
        spared = max(len(kept) // 10, 1)
        mean = dict.fromkeys(kept, 0.0)
        for one in kept:
            near = {j: float(unit[j] @ unit[one]) for j in kept if j != one}
            similar = [j for j in near if near[j] > 0.5]
            for j in near:
                if j not in similar[-spared:]:
                    mean[j] += near[j] / len(kept)
        total = sum(math.exp(value) for value in mean.values())
        return {j: math.exp(value) / total for j, value in mean.items()}

    def of(self, i: int, j: int) -> float:
        return round(self.score[j], 13)


class SpreadAndChange(Scores):
    """cake, where there is one layer."""

    def before_cut(self, i: int, kept: list[int], limit: int) -> None:
        window = self.options.get("window", 32)
        voted = max(i + 1 - window, 0)
        rows = self.a[:, voted : i + 1, :voted]
        self.votes = (rows.mean(axis=1) + 200 * rows.var(axis=1)).mean(axis=0)

    def of(self, i: int, j: int) -> float:
        return float(self.votes[j]) if j < len(self.votes) else 0.0


class Expected(Scores):
    """expected_attention."""

    def before_cut(self, i: int, kept: list[int], limit: int) -> None:
        head, sinks = self.head, self.options.get("sinks", 4)
        first = min(sinks, max(head["prompt"] - 1, 0))
        seen = min(head["prompt"], i + 1)
        queries = head["q_prerope"][first : max(seen, first + 1)].astype(np.float64)
        size = queries.shape[2]
        turn = np.zeros((size, size))
        future = self.options.get("future", 512)
        for position in range(i + 1, i + 1 + future):
            for pair, frequency in enumerate(head["inv_freq"]):
                x, y, angle = pair, pair + size // 2, position * frequency
                turn[x, x] += math.cos(angle) / future
                turn[y, y] += math.cos(angle) / future
                turn[x, y] -= math.sin(angle) / future
                turn[y, x] += math.sin(angle) / future
        self.score = dict.fromkeys(kept, 0.0)
        after = [j for j in range(i + 1) if j >= sinks]
        for g in range(self.group):
            mean = turn @ queries[:, g].mean(axis=0)
            spread = turn @ np.cov(queries[:, g].T, bias=True) @ turn.T
            logit = {}
            for j in after:
                key = head["k"][j].astype(np.float64)
                logit[j] = key @ mean * head["scale"] + key @ spread @ key * head["scale"] ** 2 / 2
            top = max(logit.values(), default=0.0)
            total = sum(math.exp(x - top) for x in logit.values())
            for j in after:
                norm = np.linalg.norm(head["v"][j].astype(np.float64))
                if j in self.score:
                    self.score[j] += math.exp(logit[j] - top) / total * norm / self.group

    def of(self, i: int, j: int) -> float:
        return self.score[j]


class RecordedScore(Scores):
    """recorded, kvzip."""

    def of(self, i: int, j: int) -> float:
        score = float(self.head["score"][j])
        return math.inf if math.isnan(score) else score


class BaseVotes(Scores):
    """snapkv, as other policies use it: its window counts as the best vote."""

    def before_cut(self, i: int, kept: list[int], limit: int) -> None:
        window, half = self.options.get("window", 64), 2
        voted = max(i + 1 - window, 0)
        votes = self.a[:, voted : i + 1, :voted].sum(axis=1).mean(axis=0) / window
        padded = np.pad(votes, half)
        self.score = {j: float(padded[j : j + 5].mean()) if j < voted else -math.inf for j in kept}
        best = max(0.0, *self.score.values())
        self.score = {j: best if x == -math.inf else x for j, x in self.score.items()}

    def of(self, i: int, j: int) -> float:
        return self.score[j]


class Critical(BaseVotes):
    """criticalkv."""

    def before_cut(self, i: int, kept: list[int], limit: int) -> None:
        super().before_cut(i, kept, limit)
        half = sorted(kept, key=lambda j: (self.score[j], j), reverse=True)[: limit // 2]
        self.score = {
            j: math.inf if j in half else (x + 1e-4) * weight(self.head, j)
            for j, x in self.score.items()
        }


class Defended(Scores):
    """defensivekv."""

    def before_cut(self, i: int, kept: list[int], limit: int) -> None:
        voted = max(i + 1 - self.options.get("window", 32), 0)
        worst = self.a[:, voted : i + 1, :voted].max(axis=(0, 1)) if voted else np.zeros(0)
        self.score = {
            j: float(max(worst[j], worst.mean())) * weight(self.head, j) if j < voted else 0.0
            for j in kept
        }

    def of(self, i: int, j: int) -> float:
        return self.score[j]


def weight(head: dict[str, Any], j: int) -> float:
    """L1 norm of W_o v, mean over the query heads."""
    v = head["v"][j].astype(np.float64)
    return float(np.mean([np.abs(wo.astype(np.float64) @ v).sum() for wo in head["wo"]]))


class Youngest(Scores):
    """duo_attention without a table."""

    def of(self, i: int, j: int) -> float:
        return j


class ReadYoungest(Youngest):
    """recent_n."""

    def read(self, i: int, kept: list[int], limit: int) -> list[int]:
        return kept[-limit:]


class Pages(Scores):
    """quest."""

    def read(self, i: int, kept: list[int], limit: int) -> list[int]:
        size = self.options.get("page", 16)
        pages: dict[int, list[int]] = {}
        for j in kept:
            pages.setdefault(j // size, []).append(j)
        best = sorted(pages.items(), key=lambda page: (self.promise(i, page[1]), page[0]))
        read: list[int] = []
        for _, tokens in reversed(best):
            read += tokens[::-1][: limit - len(read)]
        return read

    def promise(self, i: int, tokens: list[int]) -> float:
        keys = self.head["k"][tokens].astype(np.float64)
        low, high = keys.min(axis=0), keys.max(axis=0)
        queries = self.head["q"][i].astype(np.float64)
        return round(float(sum(np.maximum(q * low, q * high).sum() for q in queries)), 9)

    def of(self, i: int, j: int) -> float:
        raise AssertionError("quest evicts nothing")


class ReadBest(Scores):
    """top_k."""

    def read(self, i: int, kept: list[int], limit: int) -> list[int]:
        return sorted(kept, key=lambda j: (self.of(i, j), j))[-limit:]

    def of(self, i: int, j: int) -> float:
        return float(sum(of_head[i, j] for of_head in self.a))


class VotesThenPages(BaseVotes, Pages):
    """rocketkv."""

    def start(self) -> None:
        self.options = {"window": 32, "page": 16, **self.options}

    def before_cut(self, i: int, kept: list[int], limit: int) -> None:
        window, half = self.options["window"], self.options.get("kernel", 63) // 2
        voted = max(i + 1 - window, 0)
        votes = self.a[:, voted : i + 1, :voted].sum(axis=1).mean(axis=0) / window
        padded = np.pad(votes, half)
        self.score = {
            j: float(padded[j : j + 2 * half + 1].mean()) if j < voted else 0.0 for j in kept
        }

    def of(self, i: int, j: int) -> float:
        return self.score[j]


def best_chunks(
    scores: list[dict[int, float]], limit: int, fixed: list[int], options: dict[str, Any]
) -> list[int]:
    """chunkkv: the same chunks in all heads, up to the first that does not fit."""
    chunks: dict[int, list[int]] = {}
    for j in scores[0]:
        chunks.setdefault(j // options.get("chunk", 20), []).append(j)
    mean = {
        c: sum(score[j] for score in scores for j in tokens) / len(tokens)
        for c, tokens in chunks.items()
    }
    kept = set(fixed)
    best = sorted(chunks, key=lambda c: (mean[c], c), reverse=True)
    for chunk in best:
        if len(kept | set(chunks[chunk])) > limit:
            break
        kept |= set(chunks[chunk])
    return sorted(kept) or chunks[best[0]][-limit:]


def best_of_all(alpha: float) -> Callable[..., list[int]]:
    """adakv: each head its floor(alpha * B) best, the rest by score over all heads."""

    def allocate(scores: list[dict[int, float]], limit: int, options: dict[str, Any]) -> list[int]:
        safe = int(limit * options.get("alpha", alpha))
        ranked = []
        for h, score in enumerate(scores):
            best = sorted(score, key=lambda j: (score[j], j), reverse=True)[:safe]
            ranked += [(math.inf if j in best else x, h, j) for j, x in score.items()]
        won = sorted(ranked, reverse=True)[: limit * len(scores)]
        return [sum(h == head for _, h, _ in won) for head in range(len(scores))]

    return allocate


ALLOCATE: dict[str, Callable[..., list[int]]] = {
    "adakv": best_of_all(0.2),
    "defensivekv": best_of_all(0.2),
    "kvzip": best_of_all(0.0),
}
CHOOSE: dict[str, Callable[..., list[int]]] = {"chunkkv": best_chunks}
STORED: dict[str, Callable[[int, int], int]] = {
    "rocketkv": lambda limit, present: max(1, math.isqrt(limit * present)),
}
MORE_SCORES: dict[str, type[Scores]] = {
    "scissorhands": Unimportant,
    "keyformer": Noised,
    "caote": OutputChange,
    "nacl": Drawn,
    "r_kv": Irredundant,
    "cake": SpreadAndChange,
    "expected_attention": Expected,
    "recorded": RecordedScore,
    "kvzip": RecordedScore,
    "adakv": BaseVotes,
    "headkv": BaseVotes,
    "chunkkv": BaseVotes,
    "criticalkv": Critical,
    "defensivekv": Defended,
    "duo_attention": Youngest,
    "recent_n": ReadYoungest,
    "quest": Pages,
    "rocketkv": VotesThenPages,
    "top_k": ReadBest,
}
MORE_PROTECTION: dict[str, dict[str, Any]] = {
    "scissorhands": {"recent": "10"},
    "keyformer": {"recent": "30%"},
    "nacl": {"recent": "64"},
    "r_kv": {"recent": "8"},
    "cake": {"recent": "32"},
    "expected_attention": {"sinks": 4},
    "adakv": {"recent": "64"},
    "headkv": {"recent": "64"},
    "chunkkv": {"recent": "64"},
    "criticalkv": {"recent": "64"},
    "defensivekv": {"recent": "32"},
    "duo_attention": {"sinks": 64, "recent": "256"},
    "rocketkv": {"recent": "32"},
}
