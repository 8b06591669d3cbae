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
"""Numbers that `reaching` compares at once."""

_INT, _FLOAT = ir.IntType(32), ir.FloatType()

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
        many = ir.VectorType(_FLOAT, COMPARED)
        array = context.make_array(signature.args[0])(context, builder, args[0])
        place = builder.bitcast(builder.gep(array.data, [args[1]]), many.as_pointer())
        values = builder.load(place)
        values.align = 4
        start = ir.Constant(many, ir.Undefined)
        limits = builder.insert_element(start, args[2], ir.Constant(_INT, 0))
        lanes = ir.Constant(ir.VectorType(_INT, COMPARED), [0] * COMPARED)
        limits = builder.shuffle_vector(limits, start, lanes)
        return builder.bitcast(builder.fcmp_ordered(">=", values, limits), ir.IntType(COMPARED))

    return types.uint64(row, types.int64, types.float32), generate


times_power = cast(Callable[[np.float32, np.float32], np.float32], _times_power)
"""value * 2^n, where 1.5 * 2^23 + n is given for n; nothing may overflow or be subnormal."""

lowest_bit = cast(Callable[[np.uint64], int], _lowest_bit)
"""Number of the lowest bit set; the word must not be 0."""

reaching = cast(Callable[[NDArray[np.float32], int, np.float32], np.uint64], _reaching)
"""A bit for each of row[first : first + 64], set where it is at least the limit."""
