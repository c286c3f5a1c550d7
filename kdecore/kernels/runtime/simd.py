"""Vector primitives for Numba CPU kernels, written as LLVM vectors where the compiler's own vectorisation falls short.

Each works on flat C-contiguous arrays of float32 or float64, at element offsets, in vectors of 64 bytes (so many `lanes`):
LLVM splits them into the machine's registers (two of AVX2, four of NEON, one of AVX-512). A panel is a matrix one vector
wide, its rows next to each other. Nothing checks bounds: callers pad their buffers to whole tiles.

Measured on two Zen 3 cores (bench/NOTES.md): `multiply_tile` runs at 95 GFLOP/s a core in float32, as fast as OpenBLAS.
"""

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kdecore.arrays.rows import chebyshev_coefficients

VECTOR_BYTES = 64
TILE_ROWS = 6
"""Rows of a `multiply_tile`: with two AVX2 registers each, sums, row of b and broadcast fill 15 of 16 registers."""
SHORT_TILE_ROWS = 4
"""Rows of a `multiply_short_tile`, for what is left over: of 64 rows, the last four."""

# 2**r on [-1/2, 1/2], lowest power first: relative error below a quarter of the last bit.
_EXP2 = {"float": chebyshev_coefficients(lambda r: 2.0**r, 6), "double": chebyshev_coefficients(lambda r: 2.0**r, 12)}
_MANTISSA = {"float": 23, "double": 52}
_BIAS = {"float": 127, "double": 1023}


class _Vectors:
    """Builds vector instructions for one element type."""

    def __init__(self, context: Any, builder: Any, array_type: Any) -> None:
        self.context, self.builder = context, builder
        self.element = context.get_value_type(array_type.dtype)
        self.kind = str(self.element)
        self.bytes = 4 if self.kind == "float" else 8
        self.lanes = VECTOR_BYTES // self.bytes
        self.vector = ir.VectorType(self.element, self.lanes)
        self.index = ir.IntType(64)

    def pointer(self, array_type: Any, array: Any, offset: Any) -> Any:
        return self.builder.gep(self.context.make_array(array_type)(self.context, self.builder, array).data, [offset])

    def at(self, pointer: Any, offset: Any) -> Any:
        return self.builder.gep(pointer, [offset])

    def load(self, pointer: Any) -> Any:
        return self.builder.load(self.builder.bitcast(pointer, self.vector.as_pointer()), align=self.bytes)

    def store(self, value: Any, pointer: Any) -> None:
        self.builder.store(value, self.builder.bitcast(pointer, self.vector.as_pointer()), align=self.bytes)

    def constant(self, value: float) -> Any:
        return ir.Constant(self.vector, [ir.Constant(self.element, value)] * self.lanes)

    def splat(self, scalar: Any) -> Any:
        undefined, lane = ir.Constant(self.vector, ir.Undefined), ir.IntType(32)
        first = self.builder.insert_element(undefined, scalar, ir.Constant(lane, 0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(lane, self.lanes), [0] * self.lanes))

    def llvm(self, name: str, *operands: Any) -> Any:
        suffix = f"v{self.lanes}f{8 * self.bytes}"
        signature = ir.FunctionType(self.vector, [self.vector] * len(operands))
        function = cgutils.get_or_insert_function(self.builder.module, signature, f"llvm.{name}.{suffix}")
        return self.builder.call(function, operands)

    def reduce(self, name: str, value: Any) -> Any:
        signature = ir.FunctionType(self.element, [self.vector])
        name = f"llvm.vector.reduce.{name}.v{self.lanes}f{8 * self.bytes}"
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, signature, name), [value])

    def total(self, value: Any) -> Any:
        """Return the sum of a vector's lanes, in the vector's element type."""
        element = value.type.element
        signature = ir.FunctionType(element, [element, value.type])
        name = f"llvm.vector.reduce.fadd.v{self.lanes}f{32 if element == ir.FloatType() else 64}"
        function = cgutils.get_or_insert_function(self.builder.module, signature, name)
        return self.builder.call(function, [ir.Constant(element, 0.0), value], fastmath=["reassoc"])

    def exp2(self, x: Any) -> Any:
        """2**x for x ≤ 0; exactly 0 below the smallest normal number; NaN stays NaN."""
        builder, kind = self.builder, self.kind
        mantissa, integers = _MANTISSA[kind], ir.VectorType(ir.IntType(8 * self.bytes), self.lanes)
        # So large a number has no bits for a fraction: adding it rounds x, and leaves the biased exponent at the end.
        rounder = self.constant(1.5 * 2.0**mantissa + _BIAS[kind])
        shifted = builder.fadd(x, rounder)
        rest = builder.fsub(x, builder.fsub(shifted, rounder))
        power = self.constant(_EXP2[kind][-1])
        for coefficient in reversed(_EXP2[kind][:-1]):
            power = self.llvm("fma", power, rest, self.constant(coefficient))
        exponent = builder.shl(builder.bitcast(shifted, integers), ir.Constant(integers, [mantissa] * self.lanes))
        # Below, the exponent is out of range and the product means nothing.
        tiny = builder.fcmp_ordered("<", x, self.constant(1.0 - _BIAS[kind]))
        return builder.select(tiny, self.constant(0.0), builder.fmul(power, builder.bitcast(exponent, self.vector)))

    def transpose(self, rows: list[Any]) -> list[Any]:
        """Transpose ``lanes`` vectors: halves of the square change places, then halves of the halves."""
        lanes, step = self.lanes, self.lanes // 2
        while step:
            low = [j if j & step == 0 else lanes + j - step for j in range(lanes)]
            high = [j + step if j & step == 0 else lanes + j for j in range(lanes)]
            for i in range(lanes):
                if i & step == 0:
                    pair = rows[i], rows[i + step]
                    rows[i], rows[i + step] = (
                        self.builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(ir.IntType(32), lanes), mask))
                        for mask in (low, high)
                    )
            step //= 2
        return rows


def _tile_product(rows: int) -> Any:
    """Return the intrinsic `multiply_tile` for tiles of so many rows."""

    @intrinsic
    def multiply(typingctx, a, a0, row_step, depth_step, b, b0, depth, bias, bias0, c, c0, fresh):
        """Multiply: c[r, j] = bias[bias0 + r] + Σ_t a[r, t] · b[t, j] for r < ``rows``, j < lanes, t < depth.

        a[r, t] is ``a[a0 + r · row_step + t · depth_step]``; b and c are panels at b0 and c0. The
        result is added to what c holds unless fresh, so that several calls sum in two levels; depth ≥ 1.
        """

        def codegen(context, builder, signature, args):
            a, a0, row_step, depth_step, b, b0, depth, bias, bias0, c, c0, fresh = args
            type_a, type_b, type_bias, type_c = (signature.args[i] for i in (0, 4, 7, 9))
            simd = _Vectors(context, builder, type_a)
            index = simd.index
            first_a, first_b = simd.pointer(type_a, a, a0), simd.pointer(type_b, b, b0)
            first_bias, first_c = simd.pointer(type_bias, bias, bias0), simd.pointer(type_c, c, c0)
            rows_a = [simd.at(first_a, builder.mul(row_step, index(r))) for r in range(rows)]
            rows_c = [simd.at(first_c, index(r * simd.lanes)) for r in range(rows)]
            biases = [simd.splat(builder.load(simd.at(first_bias, index(r)))) for r in range(rows)]
            before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
            builder.branch(loop)
            builder.position_at_end(loop)
            t, sums = builder.phi(index), [builder.phi(simd.vector) for _ in range(rows)]
            row_b = simd.load(simd.at(first_b, builder.mul(t, index(simd.lanes))))
            column = builder.mul(t, depth_step)
            new = [
                simd.llvm("fma", simd.splat(builder.load(simd.at(row, column))), row_b, total)
                for row, total in zip(rows_a, sums, strict=True)
            ]
            following = builder.add(t, index(1))
            t.add_incoming(index(0), before)
            t.add_incoming(following, loop)
            for total, start, value in zip(sums, biases, new, strict=True):
                total.add_incoming(start, before)
                total.add_incoming(value, loop)
            builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)
            builder.position_at_end(after)
            for value, row in zip(new, rows_c, strict=True):
                simd.store(builder.select(fresh, value, builder.fadd(value, simd.load(row))), row)
            return context.get_dummy_value()

        args = (a, a0, row_step, depth_step, b, b0, depth, bias, bias0, c, c0, fresh)
        return types.void(*args), codegen

    return multiply


multiply_tile = _tile_product(TILE_ROWS)
multiply_short_tile = _tile_product(SHORT_TILE_ROWS)


@intrinsic
def column_max(typingctx, a, a0, rows, top, top0):
    """Raise the vector ``top[top0 : top0 + lanes]`` to the maximum of each column of the panel at a0, ignoring NaN."""

    def codegen(context, builder, signature, args):
        a, a0, rows, top, top0 = args
        simd = _Vectors(context, builder, signature.args[0])
        panel, result = simd.pointer(signature.args[0], a, a0), simd.pointer(signature.args[3], top, top0)
        largest = cgutils.alloca_once_value(builder, simd.load(result))
        with cgutils.for_range(builder, rows) as loop:
            value = simd.load(simd.at(panel, builder.mul(loop.index, simd.index(simd.lanes))))
            previous = builder.load(largest)
            builder.store(builder.select(builder.fcmp_ordered(">", value, previous), value, previous), largest)
        simd.store(builder.load(largest), result)
        return context.get_dummy_value()

    return types.void(a, a0, rows, top, top0), codegen


@intrinsic
def exp2_columns(typingctx, a, a0, rows, top, top0, total, total0):
    """Replace x by 2**(x − top) in the panel at a0, and add the sum of each column to ``total[total0 : total0 + lanes]``."""

    def codegen(context, builder, signature, args):
        a, a0, rows, top, top0, total, total0 = args
        simd = _Vectors(context, builder, signature.args[0])
        panel, result = simd.pointer(signature.args[0], a, a0), simd.pointer(signature.args[5], total, total0)
        shift = simd.load(simd.pointer(signature.args[3], top, top0))
        sums = cgutils.alloca_once_value(builder, simd.constant(0.0))
        with cgutils.for_range(builder, rows) as loop:
            row = simd.at(panel, builder.mul(loop.index, simd.index(simd.lanes)))
            value = simd.exp2(builder.fsub(simd.load(row), shift))
            simd.store(value, row)
            builder.store(builder.fadd(builder.load(sums), value), sums)
        simd.store(builder.fadd(builder.load(sums), simd.load(result)), result)
        return context.get_dummy_value()

    return types.void(a, a0, rows, top, top0, total, total0), codegen


@intrinsic
def largest_size(typingctx, a, a0, vectors):
    """Return the largest absolute value in ``a[a0 : a0 + vectors · lanes]``, ignoring NaN; 0 if there is none."""

    def codegen(context, builder, signature, args):
        a, a0, vectors = args
        simd = _Vectors(context, builder, signature.args[0])
        start = simd.pointer(signature.args[0], a, a0)
        largest = cgutils.alloca_once_value(builder, simd.constant(0.0))
        with cgutils.for_range(builder, vectors) as loop:
            size = simd.llvm("fabs", simd.load(simd.at(start, builder.mul(loop.index, simd.index(simd.lanes)))))
            previous = builder.load(largest)
            builder.store(builder.select(builder.fcmp_ordered(">", size, previous), size, previous), largest)
        return simd.reduce("fmax", builder.load(largest))

    return a.dtype(a, a0, vectors), codegen


@intrinsic
def scaled_squares(typingctx, a, a0, vectors, factor):
    """Return the sum of (a[i] · factor)² in float64 over ``a[a0 : a0 + vectors · lanes]``."""

    def codegen(context, builder, signature, args):
        a, a0, vectors, factor = args
        simd = _Vectors(context, builder, signature.args[0])
        wide = ir.VectorType(ir.DoubleType(), simd.lanes)
        start = simd.pointer(signature.args[0], a, a0)
        scale = builder.insert_element(ir.Constant(wide, ir.Undefined), factor, ir.IntType(32)(0))
        scale = builder.shuffle_vector(
            scale, scale, ir.Constant(ir.VectorType(ir.IntType(32), simd.lanes), [0] * simd.lanes)
        )
        sums = cgutils.alloca_once_value(builder, ir.Constant(wide, [0.0] * simd.lanes))
        with cgutils.for_range(builder, vectors) as loop:
            value = simd.load(simd.at(start, builder.mul(loop.index, simd.index(simd.lanes))))
            value = builder.fmul(value if simd.vector == wide else builder.fpext(value, wide), scale)
            builder.store(
                builder.fadd(builder.load(sums), builder.fmul(value, value, flags=["contract"]), flags=["contract"]), sums
            )
        return simd.total(builder.load(sums))

    return types.float64(a, a0, vectors, types.float64), codegen


@intrinsic
def add_finite(typingctx, a, a0, rows, sums, counts):
    """Add each column's finite numbers in the panel at a0 to ``sums[: lanes]``, and how many they are to ``counts``.

    Both are float64: in float32 a mean of many rows would be known less well than the rows.
    """

    def codegen(context, builder, signature, args):
        a, a0, rows, sums, counts = args
        simd = _Vectors(context, builder, signature.args[0])
        panel = simd.pointer(signature.args[0], a, a0)
        wide = ir.VectorType(ir.DoubleType(), simd.lanes)
        zero, one = ir.Constant(wide, [0.0] * simd.lanes), ir.Constant(wide, [1.0] * simd.lanes)
        targets = [
            builder.bitcast(simd.pointer(signature.args[i], array, simd.index(0)), wide.as_pointer())
            for i, array in ((3, sums), (4, counts))
        ]
        totals = [cgutils.alloca_once_value(builder, builder.load(target, align=8)) for target in targets]
        with cgutils.for_range(builder, rows) as loop:
            value = simd.load(simd.at(panel, builder.mul(loop.index, simd.index(simd.lanes))))
            finite = builder.fcmp_ordered("<", simd.llvm("fabs", value), simd.constant(math.inf))
            value = value if simd.vector == wide else builder.fpext(value, wide)
            for total, found in zip(totals, (value, one), strict=True):
                builder.store(builder.fadd(builder.load(total), builder.select(finite, found, zero)), total)
        for total, target in zip(totals, targets, strict=True):
            builder.store(builder.load(total), target, align=8)
        return context.get_dummy_value()

    return types.void(a, a0, rows, sums, counts), codegen


@intrinsic
def inner_product(typingctx, a, a0, b, b0, vectors):
    """Return Σ a[a0 + t] · b[b0 + t] over ``vectors`` · lanes elements."""

    def codegen(context, builder, signature, args):
        a, a0, b, b0, vectors = args
        simd = _Vectors(context, builder, signature.args[0])
        first, second = simd.pointer(signature.args[0], a, a0), simd.pointer(signature.args[2], b, b0)
        total = cgutils.alloca_once_value(builder, simd.constant(0.0))
        with cgutils.for_range(builder, vectors) as loop:
            place = builder.mul(loop.index, simd.index(simd.lanes))
            pair = simd.load(simd.at(first, place)), simd.load(simd.at(second, place))
            builder.store(simd.llvm("fma", *pair, builder.load(total)), total)
        return simd.total(builder.load(total))

    return a.dtype(a, a0, b, b0, vectors), codegen


@intrinsic
def add_multiples(typingctx, factors, factors0, a, a0, rows, b, b0, vectors):
    """Write Σ_j factors[factors0 + j] · a[a0 + j · width + t] to b[b0 + t], t < width = ``vectors`` · lanes, j < rows."""

    def codegen(context, builder, signature, args):
        factors, factors0, a, a0, rows, b, b0, vectors = args
        simd = _Vectors(context, builder, signature.args[2])
        scales = simd.pointer(signature.args[0], factors, factors0)
        first, target = simd.pointer(signature.args[2], a, a0), simd.pointer(signature.args[5], b, b0)
        width = builder.mul(vectors, simd.index(simd.lanes))
        with cgutils.for_range(builder, vectors) as column:
            place = builder.mul(column.index, simd.index(simd.lanes))
            total = cgutils.alloca_once_value(builder, simd.constant(0.0))
            builder.store(simd.constant(0.0), total)
            with cgutils.for_range(builder, rows) as loop:
                row = simd.load(simd.at(first, builder.add(builder.mul(loop.index, width), place)))
                scale = simd.splat(builder.load(simd.at(scales, loop.index)))
                builder.store(simd.llvm("fma", scale, row, builder.load(total)), total)
            simd.store(builder.load(total), simd.at(target, place))
        return context.get_dummy_value()

    return types.void(factors, factors0, a, a0, rows, b, b0, vectors), codegen


@intrinsic
def add_squared_gaps(typingctx, a, a0, b, b0, c, c0, vectors):
    """Add (a[a0 + t] − b[b0 + t])² to c[c0 + t], for ``vectors`` · lanes elements."""

    def codegen(context, builder, signature, args):
        a, a0, b, b0, c, c0, vectors = args
        simd = _Vectors(context, builder, signature.args[0])
        first, second, third = (
            simd.pointer(signature.args[i], array, offset) for i, array, offset in ((0, a, a0), (2, b, b0), (4, c, c0))
        )
        with cgutils.for_range(builder, vectors) as loop:
            place = builder.mul(loop.index, simd.index(simd.lanes))
            target = simd.at(third, place)
            gap = builder.fsub(simd.load(simd.at(first, place)), simd.load(simd.at(second, place)))
            simd.store(simd.llvm("fma", gap, gap, simd.load(target)), target)
        return context.get_dummy_value()

    return types.void(a, a0, b, b0, c, c0, vectors), codegen


@intrinsic
def scale_columns(typingctx, a, a0, rows, factors, factors0, total, total0):
    """Multiply each column of the panel at a0 by its factor, and write the columns' sums to ``total[total0 : …]``."""

    def codegen(context, builder, signature, args):
        a, a0, rows, factors, factors0, total, total0 = args
        simd = _Vectors(context, builder, signature.args[0])
        panel, result = simd.pointer(signature.args[0], a, a0), simd.pointer(signature.args[5], total, total0)
        factor = simd.load(simd.pointer(signature.args[3], factors, factors0))
        sums = cgutils.alloca_once_value(builder, simd.constant(0.0))
        with cgutils.for_range(builder, rows) as loop:
            row = simd.at(panel, builder.mul(loop.index, simd.index(simd.lanes)))
            value = builder.fmul(simd.load(row), factor)
            simd.store(value, row)
            builder.store(builder.fadd(builder.load(sums), value), sums)
        simd.store(builder.load(sums), result)
        return context.get_dummy_value()

    return types.void(a, a0, rows, factors, factors0, total, total0), codegen


@intrinsic
def multiply_rows(typingctx, a, a0, b, b0, rows, factors, factors0):
    """Multiply the panel at b0 by that at a0, and each of its rows by its factor."""

    def codegen(context, builder, signature, args):
        a, a0, b, b0, rows, factors, factors0 = args
        simd = _Vectors(context, builder, signature.args[0])
        panels = simd.pointer(signature.args[0], a, a0), simd.pointer(signature.args[2], b, b0)
        first = simd.pointer(signature.args[5], factors, factors0)
        with cgutils.for_range(builder, rows) as loop:
            source, target = (simd.at(x, builder.mul(loop.index, simd.index(simd.lanes))) for x in panels)
            factor = simd.splat(builder.load(simd.at(first, loop.index)))
            simd.store(builder.fmul(builder.fmul(simd.load(source), simd.load(target)), factor), target)
        return context.get_dummy_value()

    return types.void(a, a0, b, b0, rows, factors, factors0), codegen


@intrinsic
def fourth_powers(typingctx, a, a0, rows, factors, factors0, sums, fresh):
    """Write to ``sums[: rows]`` each row's sum of (a[r, j] · factor[j])⁴ over the lanes, or add it unless fresh."""

    def codegen(context, builder, signature, args):
        a, a0, rows, factors, factors0, sums, fresh = args
        simd = _Vectors(context, builder, signature.args[0])
        panel = simd.pointer(signature.args[0], a, a0)
        factor = simd.load(simd.pointer(signature.args[3], factors, factors0))
        result = simd.pointer(signature.args[5], sums, simd.index(0))
        with cgutils.for_range(builder, rows) as loop:
            value = simd.load(simd.at(panel, builder.mul(loop.index, simd.index(simd.lanes))))
            value = builder.fmul(value, factor)
            square = builder.fmul(value, value)
            total = simd.total(builder.fmul(square, square))
            target = simd.at(result, loop.index)
            builder.store(builder.select(fresh, total, builder.fadd(total, builder.load(target))), target)
        return context.get_dummy_value()

    return types.void(a, a0, rows, factors, factors0, sums, fresh), codegen


@intrinsic
def multiply_spreads(typingctx, a, a0, spreads, spreads0, rows, sizes):
    """Multiply spreads of rows, frozen, by those of a: spreads[r, j] ← σ · a[r, j].

    σ is spreads[r, j], or 2 √(spreads · size) − size where that is larger than sizes[r], a logarithm of at least 0.
    """

    def codegen(context, builder, signature, args):
        a, a0, spreads, spreads0, rows, sizes = args
        simd = _Vectors(context, builder, signature.args[0])
        panels = simd.pointer(signature.args[0], a, a0), simd.pointer(signature.args[2], spreads, spreads0)
        size_of = simd.pointer(signature.args[5], sizes, simd.index(0))
        with cgutils.for_range(builder, rows) as loop:
            source, target = (simd.at(panel, builder.mul(loop.index, simd.index(simd.lanes))) for panel in panels)
            size, spread = simd.splat(builder.load(simd.at(size_of, loop.index))), simd.load(target)
            root = simd.llvm("sqrt", builder.fmul(spread, size))
            beyond = builder.fsub(builder.fadd(root, root), size)
            sigma = builder.select(builder.fcmp_ordered(">", spread, size), beyond, spread)
            simd.store(builder.fmul(sigma, simd.load(source)), target)
        return context.get_dummy_value()

    return types.void(a, a0, spreads, spreads0, rows, sizes), codegen


@intrinsic
def greater(typingctx, a, a0, b, b0):
    """Return an integer whose bit j says whether a[a0 + j] > b[b0 + j], j < lanes."""

    def codegen(context, builder, signature, args):
        a, a0, b, b0 = args
        simd = _Vectors(context, builder, signature.args[0])
        above = simd.load(simd.pointer(signature.args[0], a, a0)), simd.load(simd.pointer(signature.args[2], b, b0))
        bits = builder.bitcast(builder.fcmp_ordered(">", *above), ir.IntType(simd.lanes))
        return builder.zext(bits, ir.IntType(64))

    return types.int64(a, a0, b, b0), codegen


@intrinsic
def columns_from_rows(typingctx, rows, index, index0, step, column, factor, panel, panel0):
    """Write a square of ``rows`` into a panel, transposed and times ``factor``.

    panel[panel0 + t · lanes + r] = rows[index[index0 + r] · step + column + t] · factor, for r, t < lanes.
    """

    def codegen(context, builder, signature, args):
        rows, index, index0, step, column, factor, panel, panel0 = args
        simd = _Vectors(context, builder, signature.args[0])
        first = simd.pointer(signature.args[0], rows, column)
        places = _Vectors(context, builder, signature.args[1]).pointer(signature.args[1], index, index0)
        target, scale = simd.pointer(signature.args[6], panel, panel0), simd.splat(factor)
        found = [
            simd.load(simd.at(first, builder.mul(builder.load(simd.at(places, simd.index(r))), step)))
            for r in range(simd.lanes)
        ]
        for t, value in enumerate(simd.transpose(found)):
            simd.store(builder.fmul(value, scale), simd.at(target, simd.index(t * simd.lanes)))
        return context.get_dummy_value()

    return types.void(rows, index, index0, step, column, factor, panel, panel0), codegen


@intrinsic
def rows_from_columns(typingctx, panel, panel0, factors, factors0, rows, index, index0, step, column):
    """Write a square of a panel into ``rows``, transposed, each lane times its factor.

    rows[index[index0 + r] · step + column + t] = panel[panel0 + t · lanes + r] · factors[factors0 + r], for r, t < lanes.
    """

    def codegen(context, builder, signature, args):
        panel, panel0, factors, factors0, rows, index, index0, step, column = args
        simd = _Vectors(context, builder, signature.args[0])
        source = simd.pointer(signature.args[0], panel, panel0)
        scales = simd.load(simd.pointer(signature.args[2], factors, factors0))
        first = simd.pointer(signature.args[4], rows, column)
        places = _Vectors(context, builder, signature.args[5]).pointer(signature.args[5], index, index0)
        found = [builder.fmul(simd.load(simd.at(source, simd.index(t * simd.lanes))), scales) for t in range(simd.lanes)]
        for r, value in enumerate(simd.transpose(found)):
            place = builder.mul(builder.load(simd.at(places, simd.index(r))), step)
            simd.store(value, simd.at(first, place))
        return context.get_dummy_value()

    return types.void(panel, panel0, factors, factors0, rows, index, index0, step, column), codegen


@intrinsic
def prefetch(typingctx, source, source0, count):
    """Ask the memory for ``count`` elements that will soon be read, past the caches that writing would fill."""

    def codegen(context, builder, signature, args):
        source, source0, count = args
        simd = _Vectors(context, builder, signature.args[0])
        start = simd.pointer(signature.args[0], source, source0)
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag]), "llvm.prefetch.p0i8"
        )
        with cgutils.for_range_slice(builder, simd.index(0), count, simd.index(simd.lanes)) as (j, _):
            line = builder.bitcast(simd.at(start, j), byte)
            builder.call(function, [line, flag(0), flag(3), flag(1)])
        return context.get_dummy_value()

    return types.void(source, source0, count), codegen


@intrinsic
def copy_rows(typingctx, source, source0, target, target0, count):
    """Copy ``count`` elements."""

    def codegen(context, builder, signature, args):
        source, source0, target, target0, count = args
        simd = _Vectors(context, builder, signature.args[0])
        start, end = simd.pointer(signature.args[0], source, source0), simd.pointer(signature.args[2], target, target0)
        cgutils.raw_memcpy(builder, end, start, count, simd.bytes, align=simd.bytes)
        return context.get_dummy_value()

    return types.void(source, source0, target, target0, count), codegen


@intrinsic
def copy_vector(typingctx, source, source0, target, target0):
    """Copy one vector."""

    def codegen(context, builder, signature, args):
        source, source0, target, target0 = args
        simd = _Vectors(context, builder, signature.args[0])
        simd.store(
            simd.load(simd.pointer(signature.args[0], source, source0)), simd.pointer(signature.args[2], target, target0)
        )
        return context.get_dummy_value()

    return types.void(source, source0, target, target0), codegen


@intrinsic
def part_vector(typingctx, a, a0, b0, gap, gap0, up, down, c, c0):
    """Add up · gap to the vector at a0, write what it was minus down · gap at b0, and both to c, one after the other.

    a0 and b0 are places in ``a``; ``gap`` and ``c`` are arrays with the places gap0 and c0.
    """

    def codegen(context, builder, signature, args):
        a, a0, b0, gap, gap0, up, down, c, c0 = args
        simd = _Vectors(context, builder, signature.args[0])
        first, second = (simd.pointer(signature.args[0], a, place) for place in (a0, b0))
        both = simd.pointer(signature.args[7], c, c0)
        start, step = simd.load(first), simd.load(simd.pointer(signature.args[3], gap, gap0))
        for factor, place, copy in ((up, first, both), (builder.fneg(down), second, simd.at(both, simd.index(simd.lanes)))):
            value = simd.llvm("fma", simd.splat(factor), step, start)
            simd.store(value, place)
            simd.store(value, copy)
        return context.get_dummy_value()

    return types.void(a, a0, b0, gap, gap0, a.dtype, a.dtype, c, c0), codegen
