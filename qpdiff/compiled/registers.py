"""Arrays as vectors in registers: what the LLVM instructions of `tiles` and `products` are put together from."""

from __future__ import annotations

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils

_FEATURES = binding.get_host_cpu_features()
VECTOR = 64 if _FEATURES.get("avx512f") else 32 if _FEATURES.get("avx") else 16
"""Bytes of a vector register."""
FUSED = ("contract",)
"""A product and a sum may be one instruction."""
WORD = ir.IntType(64)


def word(value: int):
    return ir.Constant(WORD, value)


def repeated(builder, value, lanes: int):
    """A value in all lanes."""
    zero, index = ir.Constant(ir.IntType(32), 0), ir.VectorType(ir.IntType(32), lanes)
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, value, zero)
    return builder.shuffle_vector(first, undefined, ir.Constant(index, [0] * lanes))


def first_lanes(builder, count, lanes: int):
    """The mask of so many lanes."""
    numbers = ir.Constant(ir.VectorType(WORD, lanes), list(range(lanes)))
    return builder.icmp_unsigned("<", numbers, repeated(builder, count, lanes))


class Memory:
    """Addresses in an array, and vectors from and to it; the entries of a row follow each other."""

    def __init__(self, context, builder, kind, value):
        if kind.layout != "C":
            raise TypeError(f"{kind} may have entries that do not follow each other")
        array = context.make_array(kind)(context, builder, value)
        self.builder, self.size = builder, kind.dtype.bitwidth // 8
        self.scalar = context.get_value_type(kind.dtype)
        self.lanes = VECTOR // self.size
        self.vector = ir.VectorType(self.scalar, self.lanes)
        self.nothing = ir.Constant(self.vector, None)
        self.data = builder.bitcast(array.data, ir.IntType(8).as_pointer())
        self.stride = cgutils.unpack_tuple(builder, array.strides)[0]

    def at(self, *index):
        """The address of an entry: of a matrix by its row and column."""
        *row, column = index
        offset = self.builder.mul(column, word(self.size))
        if row:
            offset = self.builder.add(offset, self.builder.mul(row[0], self.stride))
        return self.builder.gep(self.data, [offset])

    def _typed(self, address, kind, number, size):
        return self.builder.bitcast(self.builder.gep(address, [word(number * size)]), kind.as_pointer())

    def load(self, address, number=0, mask=None):
        """The vector with this number from the address on; zero where a mask is not set."""
        place = self._typed(address, self.vector, number, VECTOR)
        if mask is None:
            return self.builder.load(place, align=self.size)
        align = ir.Constant(ir.IntType(32), self.size)
        kinds = [place.type, align.type, mask.type, self.vector]
        function = self._masked("load", ir.FunctionType(self.vector, kinds))
        return self.builder.call(function, (place, align, mask, self.nothing))

    def store(self, vector, address, number=0, mask=None):
        place = self._typed(address, self.vector, number, VECTOR)
        if mask is None:
            self.builder.store(vector, place, align=self.size)
            return
        align = ir.Constant(ir.IntType(32), self.size)
        kinds = [self.vector, place.type, align.type, mask.type]
        function = self._masked("store", ir.FunctionType(ir.VoidType(), kinds))
        self.builder.call(function, (vector, place, align, mask))

    def _masked(self, what: str, kind):
        name = f"llvm.masked.{what}.v{self.lanes}{self.scalar.intrinsic_name}.p0"
        return cgutils.get_or_insert_function(self.builder.module, kind, name)

    def entry(self, address, number=0):
        return self.builder.load(self._typed(address, self.scalar, number, self.size), align=self.size)

    def repeated(self, value):
        return repeated(self.builder, value, self.lanes)

    def first(self, count):
        return first_lanes(self.builder, count, self.lanes)

    def total(self, vector):
        """The sum of all lanes."""
        name = f"llvm.vector.reduce.fadd.v{self.lanes}{self.scalar.intrinsic_name}"
        kind = ir.FunctionType(self.scalar, [self.scalar, self.vector])
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, (ir.Constant(self.scalar, 0.0), vector), fastmath=("reassoc",))

    def times(self, a, b):
        return self.builder.fmul(a, b, flags=FUSED)

    def plus(self, a, b):
        return self.builder.fadd(a, b, flags=FUSED)

    def minus(self, a, b):
        return self.builder.fsub(a, b, flags=FUSED)


def unpacked(context, builder, signature, arguments, arrays: int):
    """The first arguments as memory, the others as words."""
    pairs = list(zip(signature.args, arguments, strict=True))
    return (
        *(Memory(context, builder, kind, value) for kind, value in pairs[:arrays]),
        *(context.cast(builder, value, kind, types.int64) for kind, value in pairs[arrays:]),
    )


def span(builder, start, stop, step: int):
    """A loop from start to before stop, as a context that has the index."""
    return cgutils.for_range_slice(builder, start, stop, word(step), WORD)


def whole(builder, start, stop, step: int):
    """Where the last whole step ends."""
    steps = builder.sdiv(builder.sub(stop, start), word(step))
    return builder.add(start, builder.mul(steps, word(step)))
