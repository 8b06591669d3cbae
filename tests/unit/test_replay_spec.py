"""Policies, budgets and rhythms as users write them, and what they are told when they err."""

from __future__ import annotations

import pkgutil
from dataclasses import replace

import numpy as np
import pytest

from kvtrace.errors import InputError
from kvtrace_viewer.replay import POLICIES, parse_budget, parse_policy, parse_when, policies
from kvtrace_viewer.replay.amounts import parse_budgets
from kvtrace_viewer.replay.policies.h2o import H2O
from kvtrace_viewer.replay.spec import describe, idea


def test_parameters_reach_the_policy() -> None:
    policy = parse_policy("h2o:recent=16,renormalise=false,sinks=2")
    assert isinstance(policy, H2O)
    assert (str(policy.recent), policy.renormalise, policy.sinks) == ("16", False, 2)
    assert policy.spec == "h2o:sinks=2,recent=16,renormalise=false"
    assert parse_policy("h2o").spec == "h2o"
    assert parse_policy(policy) is policy


def test_an_unknown_policy_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"'h20' is unknown.*did you mean h2o\?"):
        parse_policy("h20")
    with pytest.raises(InputError, match="--list shows them"):
        parse_policy("zzzz")


def test_policies_in_one_word_are_told_apart() -> None:
    with pytest.raises(InputError, match=r"several policies.*--policy h2o --policy snapkv$"):
        parse_policy("h2o,snapkv")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("h2o:window=3", "h2o takes sinks"),
        ("h2o:sinks", "as key=value"),
        ("h2o:sinks=2,sinks=3", "each parameter once"),
        ("h2o:sinks=two", "a whole number of at least 0"),
        ("h2o:sinks=-1", "a whole number of at least 0"),
        ("h2o:renormalise=maybe", "true or false"),
        ("h2o:recent=lots", "tokens or a percentage"),
        ("h2o:recent=130%", "at most 100%"),
    ],
)
def test_a_bad_parameter_is_explained(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_policy(text)


@pytest.mark.parametrize("text", ["0", "0%", "-3", "101%", "ten", "", "%", "1.5", "1e3", ".5%"])
def test_a_bad_budget_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--budget 128 or --budget 25%"):
        parse_budget(text)


@pytest.mark.parametrize("text", ["5%..100%", "5%../5%", "..100%/5%", "5%..100%/", ".."])
def test_half_a_range_of_budgets_is_called_one(text: str) -> None:
    with pytest.raises(InputError, match="lacks an end or its step"):
        parse_budgets(text)


def test_budgets() -> None:
    present = np.array([1, 3, 100, 1000])
    assert parse_budget("25%").limits(present).tolist() == [1, 1, 25, 250]
    assert parse_budget("29%").limits(present).tolist() == [1, 1, 29, 290]
    assert parse_budget("12.5%").limits(present).tolist() == [1, 1, 12, 125]
    assert parse_budget(64).limits(present).tolist() == [64, 64, 64, 64]


def test_rhythms() -> None:
    assert parse_when("prefill").cuts(10, 6).tolist() == [5]
    assert parse_when("step").cuts(10, 6).tolist() == [5, 6, 7, 8, 9]
    assert parse_when("every=3").cuts(13, 6).tolist() == [8, 11]
    assert parse_when("stream").cuts(4, 2).tolist() == [0, 1, 2, 3]
    assert parse_when("chunk=4").cuts(13, 10).tolist() == [3, 7, 9]
    assert parse_when("chunk=5").cuts(13, 10).tolist() == [4, 9]
    assert parse_when("chunk=99").cuts(13, 10).tolist() == [9]
    assert replace(parse_when("chunk"), chunk_ends=(6, 11, 12)).cuts(13, 10).tolist() == [6, 9]
    assert [str(parse_when(text)) for text in ("chunk", "chunk=4")] == ["chunk", "chunk=4"]
    for text in ("every=0", "every", "often", "every=x", "chunk=0", "chunk=x"):
        with pytest.raises(InputError, match="--when step"):
            parse_when(text)


def test_every_policy_file_is_registered_and_says_what_it_is() -> None:
    files = {module.name for module in pkgutil.iter_modules(policies.__path__)}
    assert files == set(POLICIES)
    for name, kind in POLICIES.items():
        assert kind.name == name
        assert kind.__module__.endswith(f".{name}")
        assert idea(kind).endswith(".")
        assert "sinks (tokens, default" in describe(kind)
        parse_when(kind.default_when)
