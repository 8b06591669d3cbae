"""Amounts of tokens as a user writes them: `128` or `25%`."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from kvtrace.errors import InputError

MOST_BUDGETS = 1000


@dataclass(frozen=True)
class Amount:
    """A number of tokens, or a percentage of something.

    Attributes
    ----------
    tokens : int or None
        The number of tokens; None where it is a percentage.
    percent : Fraction or None
        The percentage, exact (29% of 100 must be 29, which floats get wrong).
    text : str
        As the user wrote it.
    """

    tokens: int | None
    percent: Fraction | None
    text: str

    def of(self, total: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens out of `total`: the number itself, or floor(total * P / 100)."""
        if self.percent is None:
            return np.full_like(total, self.tokens or 0)
        return total * self.percent.numerator // (100 * self.percent.denominator)

    def __str__(self) -> str:
        return self.text


def parse_amount(value: str | int | Amount, what: str, example: str) -> Amount:
    """Read an amount of zero or more.

    Raises
    ------
    InputError
        When it is no number, negative, or above 100%.
    """
    if isinstance(value, Amount):
        return value
    text = str(value).strip()
    problem = InputError(f"{what} is {text!r}; expected tokens or a percentage; write {example}")
    digits = text.removesuffix("%")
    if isinstance(value, bool) or not digits.replace(".", "", 1).isdecimal() or digits[0] == ".":
        raise problem
    if not text.endswith("%"):
        if "." in digits:
            raise problem
        return Amount(int(digits), None, str(int(digits)))
    percent = Fraction(digits)
    if percent > 100:
        raise InputError(f"{what} is {text!r}; a percentage is at most 100%; write {example}")
    return Amount(None, percent, text)


@dataclass(frozen=True)
class Budget(Amount):
    """How many tokens a cache may hold after a decision, per KV head."""

    def limits(self, present: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens kept where `present` are there: N, or max(1, floor(present * P / 100))."""
        return np.maximum(self.of(present), 1)


def parse_budget(value: str | int | Budget) -> Budget:
    """Read a budget: `128` (tokens) or `25%` (of the tokens present at each decision).

    Raises
    ------
    InputError
        When it is zero, negative, above 100%, or no number.
    """
    if isinstance(value, Budget):
        return value
    amount = parse_amount(value, "the budget", "--budget 128 or --budget 25%")
    if not amount.tokens and not amount.percent:
        raise InputError(
            f"the budget is {amount.text!r}; a cache holds at least one token; "
            "write --budget 128 or --budget 25%"
        )
    return Budget(amount.tokens, amount.percent, amount.text)


def parse_budgets(text: str) -> list[Budget]:
    """Read a budget or a range of them: `5%..100%/5%` is 5%, 10%, ... 100%.

    Raises
    ------
    InputError
        Where an end or the step is no budget, they mix tokens and percentages, or the range is
        empty or longer than 1,000.
    """
    first, dots, rest = text.partition("..")
    if not dots:
        return [parse_budget(text)]
    last, _, step = rest.partition("/")
    if not (first and last and step):
        raise InputError(
            f"the range of budgets {text!r} lacks an end or its step; FIRST..LAST/STEP was"
            " expected; write --budget 5%..100%/5%"
        )
    low, high, by = (parse_budget(part) for part in (first, last, step))
    start, end, stride = (one.percent or Fraction(one.tokens or 0) for one in (low, high, by))
    unit = "" if low.percent is None else "%"
    mixed = len({one.percent is None for one in (low, high, by)}) > 1
    count = (end - start) // stride + 1
    if mixed or not 1 <= count <= MOST_BUDGETS:
        found = "mixes tokens and percentages" if mixed else f"has {max(count, 0)} budgets"
        raise InputError(
            f"the range of budgets {text!r} {found}; FIRST..LAST/STEP with 1 to {MOST_BUDGETS:,} "
            "was expected; write --budget 5%..100%/5%"
        )
    return [parse_budget(f"{_decimal(start + i * stride)}{unit}") for i in range(count)]


def _decimal(number: Fraction) -> str:
    return str(int(number)) if number.denominator == 1 else f"{float(number):g}"
