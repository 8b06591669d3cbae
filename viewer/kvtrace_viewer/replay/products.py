"""Products of small tiles whose sums stay in a processor's registers.

BLAS packs both factors anew for every product and writes every sum to memory before anything else
is done with it: for rows of a head (as deep as head_dim) and for panels of a few pairs that costs
more than the sums do. Each sum here is taken in the order of its terms, whatever is computed
beside it: results do not hang on shapes, which BLAS's do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

LANES, DOUBLES = 16, 8
"""Floats and doubles in a vector: one register of AVX-512, several of other processors."""

Floats = NDArray[np.float32]
Product = Callable[[NDArray[Any], NDArray[Any], NDArray[Any]], None]

TILE = 4 * LANES
"""Columns in a tile of a packed factor."""

_LONG, _INT = ir.IntType(64), ir.IntType(32)
_VECTORS = {
    types.float32: ir.VectorType(ir.FloatType(), LANES),
    types.float64: ir.VectorType(ir.DoubleType(), DOUBLES),
}
_FUSED = ("contract",)  # product and sum in one instruction, where the processor has it


def aligned(*shape: int) -> Floats:
    """Return memory that begins with a cache line: loads across two of them take twice as long."""
    size = math.prod(shape)
    memory = np.empty(size + LANES, np.float32)
    first = -memory.ctypes.data // memory.itemsize % LANES
    return memory[first : first + size].reshape(shape)


def packed(vectors: Floats) -> Floats:
    """Return vectors [row, depth] as [panel, depth, LANES], the last panels filled with zeros.

    Panels are whole tiles, of TILE vectors.
    """
    rows, depth = vectors.shape
    panels = aligned(-(-rows // TILE) * TILE // LANES, depth, LANES)
    whole = rows // LANES
    panels[:whole] = vectors[: whole * LANES].reshape(whole, LANES, depth).transpose(0, 2, 1)
    panels[whole:] = 0
    if rows > whole * LANES:
        panels[whole, :, : rows - whole * LANES] = vectors[whole * LANES :].T
    return panels


def product(rows: int, vectors: int) -> Product:
    """Return a compiled function(a, b, out) that writes a @ b, for use in compiled code.

    `a` [row, depth] and `out` [row, lanes * vectors] may be parts of longer rows; `b` is
    [vector, depth, lanes], of which only lanes need be neighbours. All are float32, with LANES
    lanes; or `a` and `out` are float64, with DOUBLES lanes, and `b` is either. All shapes are the
    caller's promise.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def multiply(context: Any, a: Any, b: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            arrays = [
                context.make_array(kind)(context, builder, arg)
                for kind, arg in zip(signature.args, args, strict=True)
            ]
            vector = _VECTORS[signature.args[2].dtype]
            given = ir.VectorType(_VECTORS[signature.args[1].dtype].element, vector.count)
            depth = builder.extract_value(arrays[0].shape, 1)
            step = builder.extract_value(arrays[1].strides, 1)
            lines, columns, targets = (
                _places(builder, array, count)
                for array, count in zip(arrays, (rows, vectors, rows), strict=True)
            )
            sums = _sums(builder, lines, columns, depth, step, given, vector)
            for r, target in enumerate(targets):
                for v in range(vectors):
                    shift = v * vector.count * vector.element.get_abi_size(context.target_data)
                    place = builder.gep(target, [ir.Constant(_LONG, shift)])
                    store = builder.store(sums[r][v], builder.bitcast(place, vector.as_pointer()))
                    store.align = 4
            return context.get_dummy_value()

        return types.void(a, b, out), generate

    return cast(Product, multiply)


def _places(builder: Any, array: Any, count: int) -> list[Any]:
    """Where each of the first parts of an array begins, as pointers to bytes."""
    stride = builder.extract_value(array.strides, 0)
    bytes_of = builder.bitcast(array.data, ir.IntType(8).as_pointer())
    return [
        builder.gep(bytes_of, [builder.mul(stride, ir.Constant(_LONG, i))]) for i in range(count)
    ]


def _sums(
    builder: Any, lines: list[Any], columns: list[Any], depth: Any, step: Any, given: Any, sum_: Any
) -> list[list[Any]]:
    """Emit the loop over the depth: [row][vector], the sums.

    Vectors of a column are `step` bytes apart; their type is `given`, that of the sums `sum_`.
    """
    zero = ir.Constant(sum_, [0.0] * sum_.count)
    lines = [builder.bitcast(line, sum_.element.as_pointer()) for line in lines]
    before = builder.block
    head, body, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    k = builder.phi(_LONG)
    k.add_incoming(ir.Constant(_LONG, 0), before)
    sums = [[builder.phi(sum_) for _ in columns] for _ in lines]
    for one in (one for row in sums for one in row):
        one.add_incoming(zero, before)
    builder.cbranch(builder.icmp_signed("<", k, depth), body, after)
    builder.position_at_end(body)
    first = builder.mul(k, step)
    factors = [_vector_at(builder, builder.gep(column, [first]), given, sum_) for column in columns]
    for line, row in zip(lines, sums, strict=True):
        value = _in_all_lanes(builder, builder.load(builder.gep(line, [k])), sum_)
        for one, factor in zip(row, factors, strict=True):
            term = builder.fmul(value, factor, flags=_FUSED)
            one.add_incoming(builder.fadd(one, term, flags=_FUSED), body)
    k.add_incoming(builder.add(k, ir.Constant(_LONG, 1)), body)
    builder.branch(head)
    builder.position_at_end(after)
    return sums


def _vector_at(builder: Any, place: Any, given: Any, wanted: Any) -> Any:
    found = builder.load(builder.bitcast(place, given.as_pointer()))
    found.align = 4
    return found if given == wanted else builder.fpext(found, wanted)


def _in_all_lanes(builder: Any, value: Any, vector: Any) -> Any:
    start = ir.Constant(vector, ir.Undefined)
    one = builder.insert_element(start, value, ir.Constant(_INT, 0))
    lanes = ir.Constant(ir.VectorType(_INT, vector.count), [0] * vector.count)
    return builder.shuffle_vector(one, start, lanes)
