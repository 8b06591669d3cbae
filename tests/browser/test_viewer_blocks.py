"""The blocks page: the grid at a step is the recorded pool, and other pools stand beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
import torch
from tests.support.batching import build, generate, prompts

import kvtrace
from kvtrace_recorder import record
from kvtrace_viewer.allocation import observe, occupancy

from .conftest import Browser, Serve

CARDS = "document.querySelectorAll('.kv-pool[data-step]').length === arguments[0]"
CARD = "document.querySelector('.kv-pool').dataset"
#: A request's id may be of any length.
POOL = 20


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, serve: Serve) -> tuple[str, kvtrace.Trace]:
    """A viewer of a run short of blocks, and the run."""
    root: Path = tmp_path_factory.mktemp("served")
    torch.set_num_threads(1)
    model: Any = build()
    with record(model, root / "served.kvtrace", detail="events", strict=True):
        generate(model, prompts(18, 15, 17, 16), new=14, num_blocks=POOL)
    return serve(root), kvtrace.open(root / "served.kvtrace")


def test_the_grid_is_the_recorded_pool_at_every_step(
    browser: Browser, served: tuple[str, kvtrace.Trace]
) -> None:
    address, trace = served
    expected = occupancy(observe(trace))
    browser.open(f"{address}/blocks?trace=served.kvtrace&t=4")
    browser.until(CARDS, 1)
    for step in (4, 5, 6, 3):
        browser.until(f"{CARD}.step === '{step}'")
        found = browser.data(".kv-pool")
        assert int(found["held"]) == expected.held[step]
        assert int(found["cached"]) == expected.cached[step]
        browser.click("#blocks-forward" if step < 6 else "#blocks-first")
        if step == 6:
            browser.until(f"{CARD}.step === '0'")
            break
    assert "t=0" in browser.query()
    # The pool's last block is the first that is given away.
    cell = 34
    browser.hover(".kv-pool-grid", (POOL - 0.5) * cell, cell / 2)
    browser.until("document.querySelector('#blocks-tip').innerText.includes('Block 21')")
    tip = browser.text("#blocks-tip")
    assert "4 of 4 tokens" in tip
    assert "held by 1" in tip
    assert "written by a prompt" in tip
    # And which tokens these are: without a tokenizer their ids.
    owner = trace.tokens(0)["token_id"].to_pylist()
    browser.until(f"document.querySelector('.kv-tip-text')?.innerText.includes('[{owner[0]}]')")


def test_a_link_restores_the_form(browser: Browser, served: tuple[str, kvtrace.Trace]) -> None:
    address, _ = served
    link = f"{address}/blocks?trace=served.kvtrace&pool=30+64&max_batch=4&policy=lru+nonsense"
    browser.open(link)
    browser.until(CARDS, 1)
    browser.until("/policy=lru(&|$)/.test(location.search)")
    asked = parse_qs(browser.query().removeprefix("?"))
    assert asked["pool"] == ["30 64"]
    assert asked["max_batch"] == ["4"]
    assert "preempt" not in asked


def test_other_pools_are_simulated_beside_it(
    browser: Browser, served: tuple[str, kvtrace.Trace]
) -> None:
    address, trace = served
    browser.open(f"{address}/blocks?trace=served.kvtrace")
    browser.until(CARDS, 1)
    tags = browser.find("#blocks-pool")
    tags.send_keys("30 100000 ")
    browser.click("#blocks-run")
    browser.until(CARDS, 3)
    rows = trace.sql("select allocation_run, pool from allocation_runs where kind = 'what-if'")
    assert sorted(rows["pool"].to_pylist()) == [30, 100_000]
    runs = parse_qs(browser.query().removeprefix("?"))["runs"][0].split(" ")
    assert set(runs) == {"allocation-recorded", *rows["allocation_run"].to_pylist()}
    # So many blocks that a cell is several of them; the counts are those of the blocks.
    large = next(r for r in runs if "100000" in r)
    found = browser.data(f".kv-pool[data-run='{large}']")
    assert int(found["group"]) > 1
    assert int(found["held"]) == int(browser.data(".kv-pool")["held"])
    # The address is the view.
    browser.open(f"{address}/blocks{browser.query()}")
    browser.until(CARDS, 3)


def test_without_blocks_the_page_says_what_to_do(browser: Browser, address: str) -> None:
    browser.open(f"{address}/blocks?trace=run.kvtrace")
    browser.until("document.querySelector('#blocks-status')?.innerText.includes('simulate a pool')")
    browser.click("#blocks-run")
    browser.until("document.querySelector('#blocks-run-status').innerText.includes('--pool 256')")
