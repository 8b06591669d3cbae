"""Does a replay predict what eviction does to the model? Predicted loss against measured KL.

    python benchmarks/certificate.py [--texts 3] [--policy NAME ...] [--json FILE]
    python benchmarks/certificate.py --read FILE [FILE ...] [--figure FILE.svg]

The bundled model samples 128 tokens after each of a few prompts of 512 (its own, and topics of
Python's documentation as pydoc_data ships them), with a seed for each. Every policy that evicts, or
chooses per query what is read, is replayed at six budgets, once with one cut after the prompt and
once with a cut after every token, and the model is run under every kept set. Printed are Spearman
rank correlations between what the replay predicted (lost mass, output error, miss rate) and the
measured mean KL, per text: over all pairs, and over the policies of one budget; and what is lost by
choosing the policy of each budget that a predictor likes best. Pairs with the same kept sets count
once.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import kvtrace
import kvtrace_recorder
from kvtrace_recorder import demo
from kvtrace_recorder.certificate import Certificate, certify
from kvtrace_recorder.certificate.certify import PASSES, Options
from kvtrace_viewer.replay import POLICIES, Result, replay, replayable

PROMPT, NEW = 512, 128
BUDGETS = ["5%", "10%", "20%", "35%", "50%", "75%"]
WHENS = ("prefill", "step")
#: Left out of the correlations: one knows the future that KL is measured on, one every key.
BOUNDING = ("oracle", "top_k")
PREDICTORS = ("lost mass", "output error", "miss rate")
TEXTS = {"bundled prompt": demo.PROMPT} | {
    f"pydoc {name}": topics[name] for name in ("specialnames", "compound", "types", "debugger")
}

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--texts", type=int, default=3, help=f"of {len(TEXTS)} (default: 3)")
    parser.add_argument("--policy", action="append", help="only this one; may be given several")
    parser.add_argument("--json", type=Path, help="write every pair")
    parser.add_argument(
        "--read",
        type=Path,
        nargs="+",
        help="summarise pairs that --json wrote, of other policies in each file; run nothing",
    )
    parser.add_argument(
        "--live",
        metavar="BUDGET",
        help="instead: run what decides while decoding live at this budget, on one text",
    )
    parser.add_argument("--figure", type=Path, help="draw the pairs as SVG")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.live:
        show_live(args.live)
        return
    if args.read:
        rows = [row for file in args.read for row in json.loads(file.read_text())]
    else:
        rows = [
            row
            for seed, name in enumerate(list(TEXTS)[: args.texts])
            for row in measure(name, TEXTS[name], seed, args.policy)
        ]
    if args.json:
        args.json.write_text(json.dumps(rows, indent=0))
    show(rows)
    if args.figure:
        args.figure.parent.mkdir(parents=True, exist_ok=True)
        args.figure.write_text(figure(rows))


def measure(text: str, content: str, seed: int, policies: list[str] | None) -> list[Row]:
    """Record one text, replay some policies or all, certify everything."""
    found: list[Row] = []
    with recorded(content, seed) as (trace, model):
        for when in WHENS:
            for budget in BUDGETS:
                results = replay(trace, policies or able(trace), [budget], when=when)
                unique = {kept(one): one for one in reversed(results)}
                by_name = {one.id: one for one in unique.values()}
                options = Options(passes=0, generated=0)
                done = certify(trace, list(by_name), model, options=options)
                found += [pair(text, by_name[one.replay], one) for one in done]
                Console(stderr=True).print(f"{text}, {when}, {budget}: {len(done)} pairs")
    return found


def kept(result: Result) -> tuple[bytes, str]:
    """What two results share that hide the same keys; what queries choose is a policy's own."""
    return result.evicted_at.tobytes(), result.policy if result.selects else ""


@contextmanager
def recorded(content: str, seed: int) -> Iterator[tuple[kvtrace.Trace, Any]]:
    """Record the bundled model as it goes on from a text."""
    model, tokenizer = demo.load()
    ids = tokenizer(content, return_tensors="pt")["input_ids"][:, :PROMPT]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.kvtrace"
        torch.manual_seed(seed)
        with kvtrace_recorder.record(model, path, tokenizer=tokenizer):
            # The last token that is sampled is not processed, so one more.
            model.generate(ids, max_new_tokens=NEW + 1, min_new_tokens=NEW + 1, do_sample=True)
        yield kvtrace.open(path), model


def pair(text: str, result: Result, measured: Certificate) -> Row:
    assert result.retained_mass is not None
    return {
        "text": text,
        "when": result.when,
        "budget": result.budget,
        "policy": result.policy,
        "lost mass": 1 - result.retained_mass,
        "output error": result.output_error,
        "miss rate": result.misses / (result.hits + result.misses),
        "KL": measured.kl_mean,
        "KL p95": measured.kl_p95,
        "perplexity": measured.perplexity_full,
        "perplexity evicted": measured.perplexity_evicted,
        "agreement": measured.agreement,
    }


def show_live(budget: str) -> None:
    """The kept sets of a replay beside those of the policy run live, where they can differ."""
    table = Table("policy", "passes", "settled", "Jaccard", "least event", "KL", "KL live")
    with recorded(demo.PROMPT, 0) as (trace, model):
        results = replay(trace, able(trace), [budget], when="step")
        names = [one.id for one in results if one.exactness == "E2" and one.policy != "oracle"]
        options = Options(passes=PASSES, generated=0)
        for one in certify(trace, names, model, options=options):
            policy = one.replay.partition("-")[0]
            if one.live is None:
                table.add_row(policy, "-", one.live_reason, "-", "-", f"{one.kl_mean:.4f}", "-")
                continue
            events = one.live.events
            means = [
                events["jaccard"][events["position"] == at].mean()
                for at in np.unique(events["position"])
            ]
            table.add_row(
                policy,
                str(one.live.passes),
                "yes" if one.live.settled else "no",
                f"{one.live.jaccard:.4f}",
                f"{min(means):.4f}",
                f"{one.kl_mean:.4f}",
                f"{one.live.kl_mean:.4f}",
            )
    Console(width=140).print(table)


def able(trace: kvtrace.Trace) -> list[str]:
    """Policies that hide keys, and that this trace can replay; recent_n hides as sliding_window."""
    can = {row["policy"] for row in replayable(trace) if row["replay"] != "no"}
    return [name for name in POLICIES if name in can and name not in ("full", "recent_n")]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; equal values share the mean of their ranks."""
    x, y = (ranks(np.asarray(values)) for values in (a, b))
    return float(np.corrcoef(x, y)[0, 1])


def ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[inverse]


def groups(rows: Iterable[Row], *keys: str) -> dict[tuple[str, ...], list[Row]]:
    found: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        found[tuple(row[key] for key in keys)].append(row)
    return found


def show(rows: list[Row]) -> None:
    out = Console(width=140)
    out.print(f"{len(rows)} pairs with kept sets of their own: {counts(rows)}")
    real = [row for row in rows if row["policy"] not in BOUNDING]
    out.print(f"{len(real)} without {' and '.join(BOUNDING)}")
    for when in WHENS:
        chosen = [row for row in real if row["when"] == when]
        table = Table(
            "predictor",
            "all pairs of a text",
            "policies of one budget",
            *BUDGETS,
            "KL of its choice / best",
            title=f"--when {when}: Spearman correlation with mean KL, without oracle and top_k",
            title_justify="left",
        )
        for name in PREDICTORS:
            table.add_row(name, *correlations(chosen, name))
        out.print(table)
    out.print(by_policy(rows))


def counts(rows: list[Row]) -> str:
    per = {when: len(of_when) for (when,), of_when in groups(rows, "when").items()}
    return f"{len(groups(rows, 'text'))} texts, {len(groups(rows, 'policy'))} policies; {per}"


def correlations(rows: list[Row], predictor: str) -> list[str]:
    """Cells of a line: mean (least to greatest) over the texts, and over budgets and texts."""

    def of(some: list[Row]) -> float:
        return spearman([r[predictor] for r in some], [r["KL"] for r in some])

    whole = [of(some) for some in groups(rows, "text").values()]
    within = {key: of(some) for key, some in groups(rows, "budget", "text").items()}
    by_budget = [
        np.mean([value for (of_budget, _), value in within.items() if of_budget == budget])
        for budget in BUDGETS
    ]
    cost = [
        min(some, key=lambda r: r[predictor])["KL"] / min(r["KL"] for r in some)
        for some in groups(rows, "budget", "text").values()
    ]
    inner = list(within.values())
    return [
        f"{np.mean(whole):.3f} ({min(whole):.3f} to {max(whole):.3f})",
        f"{np.mean(inner):.3f} ({min(inner):.3f} to {max(inner):.3f})",
        *(f"{value:.2f}" for value in by_budget),
        f"{np.median(cost):.2f} (worst {max(cost):.2f})",
    ]


def by_policy(rows: list[Row]) -> Table:
    table = Table("policy", title="mean KL over the texts, nats", title_justify="left")
    for when in WHENS:
        for budget in BUDGETS:
            table.add_column(f"{when} {budget}", justify="right")
    for (policy,), of_policy in groups(rows, "policy").items():
        cells = groups(of_policy, "when", "budget")
        table.add_row(
            policy,
            *(
                f"{np.mean([r['KL'] for r in cells[when, budget]]):.4f}"
                if (when, budget) in cells
                else "-"
                for when in WHENS
                for budget in BUDGETS
            ),
        )
    return table


WIDTH, HEIGHT, LEFT, TOP, PANEL, DEEP = 760, 380, 62, 44, 300, 270
COLOURS = ("#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#d4b800")


def figure(rows: list[Row]) -> str:
    """Mean KL over lost mass, and over output error, logarithmic, a dot a pair."""
    real = [row for row in rows if row["policy"] not in BOUNDING]
    low, high = (
        np.floor(np.log10(min(r["KL"] for r in real))),
        np.log10(max(r["KL"] for r in real)),
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for at, name in enumerate(("lost mass", "output error")):
        parts += panel(real, name, LEFT + at * (PANEL + 60), low, np.ceil(high))
    for i, budget in enumerate(BUDGETS):
        x = LEFT + i * 62
        parts.append(f'<circle cx="{x}" cy="16" r="4" fill="{COLOURS[i]}"/>')
        parts.append(f'<text x="{x + 8}" y="20">{budget}</text>')
    parts.append(
        f'<text x="{LEFT + 6 * 62}" y="20">of the cache kept; ring: a cut each token</text>'
    )
    return "\n".join([*parts, "</svg>", ""])


def panel(rows: list[Row], name: str, left: int, low: float, high: float) -> list[str]:
    values = np.log10([row[name] for row in rows])
    first, last = np.floor(values.min()), np.ceil(values.max())
    parts = [
        f'<rect x="{left}" y="{TOP}" width="{PANEL}" height="{DEEP}" fill="none" stroke="#999"/>',
        f'<text x="{left + PANEL / 2}" y="{TOP + DEEP + 38}" text-anchor="middle">'
        f"predicted {name}</text>",
    ]
    for power in np.arange(first, last + 1):
        x = left + (power - first) / (last - first) * PANEL
        parts.append(f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{TOP + DEEP}" stroke="#eee"/>')
        parts.append(
            f'<text x="{x}" y="{TOP + DEEP + 18}" text-anchor="middle">{10.0**power:g}</text>'
        )
    for power in np.arange(low, high + 1):
        y = TOP + DEEP - (power - low) / (high - low) * DEEP
        parts.append(f'<line x1="{left}" x2="{left + PANEL}" y1="{y}" y2="{y}" stroke="#eee"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{10.0**power:g}</text>')
    parts.append(f'<text x="{left}" y="{TOP - 8}">measured KL, nats</text>')
    for row, value in zip(rows, values, strict=True):
        x = left + (value - first) / (last - first) * PANEL
        y = TOP + DEEP - (np.log10(row["KL"]) - low) / (high - low) * DEEP
        colour = COLOURS[BUDGETS.index(row["budget"])]
        fill = colour if row["when"] == "prefill" else "none"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{fill}" stroke="{colour}"/>')
    return parts


if __name__ == "__main__":
    main()
