"""What numba has no word for: bits of numbers, and many numbers compared at once.

Plain LLVM, so that it runs on every processor numba does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

COMPARED = 64
"""Numbers that are compared at once."""

_INT, _LONG, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_INTS, _FLOATS = ir.VectorType(_INT, COMPARED), ir.VectorType(_FLOAT, COMPARED)

Generate = Callable[[Any, Any, Any, Any], Any]
Typed = tuple[Any, Generate]


@intrinsic  # type: ignore[untyped-decorator]
def _times_power(context: Any, value: Any, power: Any) -> Typed:
    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        bits, exponent = (builder.bitcast(arg, _INT) for arg in args)
        exponent = builder.shl(exponent, ir.Constant(_INT, 23))
        return builder.bitcast(builder.add(bits, exponent), _FLOAT)

    return types.float32(types.float32, types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def _lowest_bit(context: Any, word: Any) -> Typed:
    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _reaching(context: Any, row: Any, first: Any, limit: Any) -> Typed:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = _values_at(builder, _data(context, builder, signature, args, 0), args[1], _FLOATS)
        limits = _in_all_lanes(builder, args[2], _FLOATS)
        return builder.bitcast(builder.fcmp_ordered(">=", values, limits), ir.IntType(COMPARED))

    return types.uint64(row, types.int64, types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def _equal_held(context: Any, keys: Any, barred: Any, first: Any, key: Any) -> Typed:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        found = _held_at(context, builder, signature, args, args[2])
        wanted = _in_all_lanes(builder, args[3], _INTS)
        return builder.bitcast(builder.icmp_signed("==", found, wanted), ir.IntType(COMPARED))

    return types.uint64(keys, barred, types.int64, types.int32), generate


@intrinsic  # type: ignore[untyped-decorator]
def _least_held(context: Any, keys: Any, barred: Any, first: Any, last: Any) -> Typed:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        before = builder.block
        head, body, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
        builder.branch(head)
        builder.position_at_end(head)
        at, least = builder.phi(_LONG), builder.phi(_INTS)
        at.add_incoming(args[2], before)
        least.add_incoming(ir.Constant(_INTS, [2**31 - 1] * COMPARED), before)
        builder.cbranch(builder.icmp_signed("<", at, args[3]), body, after)
        builder.position_at_end(body)
        found = _held_at(context, builder, signature, args, at)
        lower = builder.select(builder.icmp_signed("<", found, least), found, least)
        least.add_incoming(lower, body)
        at.add_incoming(builder.add(at, ir.Constant(_LONG, COMPARED)), body)
        builder.branch(head)
        builder.position_at_end(after)
        kind = ir.FunctionType(_INT, [_INTS])
        name = f"llvm.vector.reduce.smin.v{COMPARED}i32"
        return builder.call(builder.module.declare_intrinsic(name, fnty=kind), [least])

    return types.int32(keys, barred, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _between(context: Any, line: Any, at: Any, first: Any, last: Any) -> Typed:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = _values_at(builder, _data(context, builder, signature, args, 0), args[1], _INTS)
        first, last = (_in_all_lanes(builder, args[number], _INTS) for number in (2, 3))
        after = builder.icmp_signed(">=", values, first)
        both = builder.and_(after, builder.icmp_signed("<=", values, last))
        return builder.bitcast(both, ir.IntType(COMPARED))

    return types.uint64(line, types.int64, types.int32, types.int32), generate


def _data(context: Any, builder: Any, signature: Any, args: Any, number: int) -> Any:
    """Where the array begins that is given as an argument."""
    return context.make_array(signature.args[number])(context, builder, args[number]).data


def _values_at(builder: Any, data: Any, place: Any, kind: Any) -> Any:
    values = builder.load(builder.bitcast(builder.gep(data, [place]), kind.as_pointer()))
    values.align = 4
    return values


def _held_at(context: Any, builder: Any, signature: Any, args: Any, place: Any) -> Any:
    """The greater of keys and barred."""
    keys, barred = (
        _values_at(builder, _data(context, builder, signature, args, number), place, _INTS)
        for number in (0, 1)
    )
    return builder.select(builder.icmp_signed(">", keys, barred), keys, barred)


def _in_all_lanes(builder: Any, value: Any, kind: Any) -> Any:
    start = ir.Constant(kind, ir.Undefined)
    one = builder.insert_element(start, value, ir.Constant(_INT, 0))
    lanes = ir.Constant(ir.VectorType(_INT, COMPARED), [0] * COMPARED)
    return builder.shuffle_vector(one, start, lanes)


times_power = cast(Callable[[np.float32, np.float32], np.float32], _times_power)
"""value * 2^n, where 1.5 * 2^23 + n is given for n; nothing may overflow or be subnormal."""

lowest_bit = cast(Callable[[np.uint64], int], _lowest_bit)
"""Number of the lowest bit set; the word must not be 0."""

reaching = cast(Callable[[NDArray[np.float32], int, np.float32], np.uint64], _reaching)
"""A bit for each of row[first : first + 64], set where it is at least the limit."""

between = cast(Callable[[NDArray[np.int32], int, int, int], np.uint64], _between)
"""A bit for each of line[at : at + 64], set where it is a number from the first to the last."""

equal_held = cast(
    Callable[[NDArray[np.int32], NDArray[np.int32], int, int], np.uint64], _equal_held
)
"""A bit for each of 64 places from one on, set where the greater of keys and barred is a key."""

least_held = cast(Callable[[NDArray[np.int32], NDArray[np.int32], int, int], int], _least_held)
"""Least of the greater of keys and barred from one place to another, a multiple of 64 further."""
