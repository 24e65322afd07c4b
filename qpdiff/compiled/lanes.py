"""Numbers of several problems side by side in a vector register, one lane for each: a type for compiled functions.

Where problems are small, most of a vector stays empty and a step is over before the processor has filled its pipelines.
With `Lanes` in place of numbers and a `Stack` in place of an array, the same functions take a step of several problems
at once. What such functions may not do is branch on a number: they `select`, and ask for `some` or `every`.
"""

from __future__ import annotations

import operator

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.typeconv import Conversion
from numba.core.typing.templates import AbstractTemplate, AttributeTemplate, infer_getattr, infer_global, signature
from numba.cpython.slicing import fix_slice
from numba.extending import intrinsic, lower_builtin, lower_cast, lower_getattr, register_model

from . import registers
from .compiler import FAST
from .registers import word

LANES = 8
_SIZE = 8 * LANES
_FAST = tuple(sorted(FAST))
_DOUBLE, _BIT = ir.DoubleType(), ir.IntType(1)


class _InLanes(types.Type):
    """A type that values of others become by repetition."""

    def __init__(self, name: str, *others):
        self.others = others
        super().__init__(name=name)

    def unify(self, typing_context, other):
        return self if isinstance(other, self.others) else None

    def can_convert_from(self, typing_context, other):
        return Conversion.safe if isinstance(other, self.others) else None


class _LanesType(_InLanes):
    pass


class _MaskType(_InLanes):
    pass


Lanes = _LanesType("Lanes", types.Number)
"""A float64 of each problem."""
Mask = _MaskType("Mask", types.Boolean)
"""A truth value of each problem."""


class Stack(types.Type):
    """A vector or matrix of `Lanes`; its entries follow each other, and of each the lanes."""

    def __init__(self, ndim: int):
        self.ndim = ndim
        super().__init__(name=f"Stack({ndim})")


@register_model(_LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, ir.VectorType(_DOUBLE, LANES))


@register_model(_MaskType)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, ir.VectorType(_BIT, LANES))


@register_model(Stack)
class _StackModel(models.StructModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, [("data", types.voidptr), ("shape", types.UniTuple(types.int64, kind.ndim))])


@lower_cast(types.Number, Lanes)
def _number_to_lanes(context, builder, source, target, value):
    return registers.repeated(builder, context.cast(builder, value, source, types.float64), LANES)


@lower_cast(types.Boolean, Mask)
def _boolean_to_mask(context, builder, source, target, value):
    return registers.repeated(builder, context.cast(builder, value, source, types.boolean), LANES)


# ---- operators


def _operator(functions, kind, result, generate, operands: int = 2):
    """An operator of which at least one operand is of this kind, and the others become so."""

    class Template(AbstractTemplate):
        def generic(self, args, kws):
            if kind in args and all(a == kind or isinstance(a, kind.others) for a in args):
                return signature(result, *[kind] * operands)
            return None

    for function in functions:
        infer_global(function)(type(f"{function.__name__}_{kind.name}", (Template,), {}))
        lower_builtin(function, *[kind] * operands)(
            lambda context, builder, signature, arguments: generate(builder, *arguments)
        )


_operator([operator.add, operator.iadd], Lanes, Lanes, lambda builder, a, b: builder.fadd(a, b, flags=_FAST))
_operator([operator.sub, operator.isub], Lanes, Lanes, lambda builder, a, b: builder.fsub(a, b, flags=_FAST))
_operator([operator.mul, operator.imul], Lanes, Lanes, lambda builder, a, b: builder.fmul(a, b, flags=_FAST))
_operator([operator.truediv, operator.itruediv], Lanes, Lanes, lambda builder, a, b: builder.fdiv(a, b, flags=_FAST))
_operator([operator.neg], Lanes, Lanes, lambda builder, a: builder.fneg(a), operands=1)
_operator([abs], Lanes, Lanes, lambda builder, a: _call(builder, "fabs", a), operands=1)
for _function, _sign in {
    operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=", operator.eq: "==",
}.items():  # fmt: skip
    _operator([_function], Lanes, Mask, lambda builder, a, b, sign=_sign: builder.fcmp_ordered(sign, a, b))
_operator([operator.and_, operator.iand], Mask, Mask, lambda builder, a, b: builder.and_(a, b))
_operator([operator.or_, operator.ior], Mask, Mask, lambda builder, a, b: builder.or_(a, b))


def _call(builder, name: str, *arguments):
    kind = arguments[0].type
    suffix = f"v{LANES}{kind.element.intrinsic_name}" if isinstance(kind, ir.VectorType) else kind.intrinsic_name
    function_type = ir.FunctionType(kind, [kind] * len(arguments))
    function = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.{name}.{suffix}")
    return builder.call(function, arguments, fastmath=("nsz",))


def _extreme(name: str):
    @intrinsic
    def extreme(typing_context, a, b):
        kind = typing_context.unify_types(a, b)

        def generate(context, builder, signature, arguments):
            values = (context.cast(builder, v, of, kind) for v, of in zip(arguments, signature.args, strict=True))
            return _call(builder, name, *values)

        return kind(a, b), generate

    return extreme


larger = _extreme("maximum")
"""The larger of two numbers, NaN if one of them is: an instruction that LLVM makes vectors of."""
smaller = _extreme("minimum")


@intrinsic
def root(typing_context, a):
    """The square root."""
    return a(a), lambda context, builder, signature, arguments: _call(builder, "sqrt", *arguments)


@intrinsic
def select(typing_context, condition, a, b):
    """The first of two values where a condition holds, else the second."""
    kind = typing_context.unify_types(types.unliteral(a), types.unliteral(b))
    if condition == Mask and kind not in (Lanes, Mask):
        kind = Mask if isinstance(kind, types.Boolean) else Lanes

    def generate(context, builder, signature, arguments):
        condition, *values = arguments
        a, b = (context.cast(builder, v, of, kind) for v, of in zip(values, signature.args[1:], strict=True))
        return builder.select(condition, a, b)

    return kind(condition, a, b), generate


@intrinsic
def zero(typing_context, array):
    """Zero for one problem, or for each problem of a stack."""
    kind = Lanes if isinstance(array, Stack) else types.float64
    return kind(array), lambda context, builder, signature, arguments: context.get_constant_null(kind)


def _reduction(name: str):
    @intrinsic
    def reduction(typing_context, mask):
        def generate(context, builder, signature, arguments):
            (value,) = arguments
            if signature.args[0] != Mask:
                return value
            kind = ir.FunctionType(_BIT, [value.type])
            function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.{name}.v{LANES}i1")
            return builder.call(function, (value,))

        return types.boolean(mask), generate

    return reduction


some, every = _reduction("or"), _reduction("and")
"""Whether a condition holds for a problem at least, and whether for all."""


@intrinsic
def no(typing_context, condition):
    """Where a condition does not hold."""
    return condition(condition), lambda context, builder, signature, arguments: builder.not_(arguments[0])


@intrinsic
def each(typing_context, beside, value):
    """A value as it is beside a number, and for each problem beside lanes."""
    kind = types.unliteral(value)
    if beside == Lanes:
        kind = Mask if isinstance(kind, types.Boolean) else Lanes

    def generate(context, builder, signature, arguments):
        return context.cast(builder, arguments[1], signature.args[1], kind)

    return kind(beside, value), generate


@intrinsic
def first_lanes(typing_context, count):
    """The mask of so many lanes."""

    def generate(context, builder, signature, arguments):
        count = context.cast(builder, arguments[0], signature.args[0], types.int64)
        return registers.first_lanes(builder, count, LANES)

    return Mask(count), generate


@intrinsic
def of_lane(typing_context, value, lane):
    """What the problem of a lane has: a number, or whether a condition holds."""

    def generate(context, builder, signature, arguments):
        lane = context.cast(builder, arguments[1], signature.args[1], types.int64)
        return builder.extract_element(arguments[0], lane)

    return (types.boolean if value == Mask else types.float64)(value, lane), generate


# ---- arrays


@intrinsic
def stacked(typing_context, array):
    """An array of floats whose last axis are the lanes, as a stack."""
    if not (array.dtype == types.float64 and array.layout == "C"):
        raise TypeError(f"{array} is no contiguous array of float64")
    kind = Stack(array.ndim - 1)

    def generate(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        shape = cgutils.unpack_tuple(builder, array.shape)[:-1]
        return _make(context, builder, kind, array.data, shape)

    return kind(array), generate


def _make(context, builder, kind, data, shape):
    stack = cgutils.create_struct_proxy(kind)(context, builder)
    stack.data = builder.bitcast(data, cgutils.voidptr_t)
    stack.shape = cgutils.pack_array(builder, shape)
    return stack._getvalue()


def _opened(context, builder, kind, value):
    stack = cgutils.create_struct_proxy(kind)(context, builder, value=value)
    return stack.data, cgutils.unpack_tuple(builder, stack.shape, kind.ndim)


@infer_getattr
class _StackAttributes(AttributeTemplate):
    key = Stack

    def resolve_shape(self, stack):
        return types.UniTuple(types.int64, stack.ndim)

    def resolve_itemsize(self, stack):
        return types.int64


@lower_getattr(Stack, "shape")
def _shape(context, builder, kind, value):
    return cgutils.create_struct_proxy(kind)(context, builder, value=value).shape


def _numbers(index):
    """The integers that an index is made of, None if it is something else."""
    kinds = index.types if isinstance(index, types.BaseTuple) else (index,)
    return kinds if all(isinstance(kind, types.Integer) for kind in kinds) else None


@lower_getattr(Stack, "itemsize")
def _itemsize(context, builder, kind, value):
    return word(8)


@infer_global(operator.getitem)
class _GetItem(AbstractTemplate):
    def generic(self, args, kws):
        stack, index = args
        if not isinstance(stack, Stack):
            return None
        numbers = _numbers(index)
        if numbers and len(numbers) <= stack.ndim:
            left = stack.ndim - len(numbers)
            return signature(Stack(left) if left else Lanes, stack, index)
        if isinstance(index, types.SliceType) and stack.ndim == 1:
            return signature(stack, stack, index)
        return None


@infer_global(operator.setitem)
class _SetItem(AbstractTemplate):
    def generic(self, args, kws):
        stack, index, _ = args
        numbers = _numbers(index)
        if isinstance(stack, Stack) and (
            (numbers and len(numbers) == stack.ndim) or isinstance(index, types.SliceType)
        ):
            return signature(types.none, stack, index, Lanes)
        return None


def _address(context, builder, kind, value, index_kind, index):
    """Where the entry or row with an index lies, and the axes of it that are left."""
    data, shape = _opened(context, builder, kind, value)
    kinds = _numbers(index_kind)
    parts = cgutils.unpack_tuple(builder, index) if isinstance(index_kind, types.BaseTuple) else [index]
    place = word(0)
    for part, part_kind, length in zip(parts, kinds, shape, strict=False):
        number = context.cast(builder, part, part_kind, types.int64)
        place = builder.add(builder.mul(place, length), number)
    for length in shape[len(parts) :]:
        place = builder.mul(place, length)
    return builder.gep(data, [builder.mul(place, word(_SIZE))]), shape[len(parts) :]


def _place(builder, address):
    return builder.bitcast(address, ir.VectorType(_DOUBLE, LANES).as_pointer())


def _get(context, builder, signature, arguments):
    (kind, index_kind), (value, index) = signature.args, arguments
    address, left = _address(context, builder, kind, value, index_kind, index)
    if left:
        return _make(context, builder, signature.return_type, address, left)
    return builder.load(_place(builder, address), align=8)


def _set(context, builder, signature, arguments):
    (kind, index_kind, _), (value, index, lanes) = signature.args, arguments
    address, _ = _address(context, builder, kind, value, index_kind, index)
    builder.store(lanes, _place(builder, address), align=8)
    return context.get_dummy_value()


for _index in (types.Integer, types.BaseTuple):
    lower_builtin(operator.getitem, Stack, _index)(_get)
    lower_builtin(operator.setitem, Stack, _index, Lanes)(_set)


@lower_builtin(operator.getitem, Stack, types.SliceType)
def _get_slice(context, builder, signature, arguments):
    kind, (value, index) = signature.args[0], arguments
    start, length, data, _ = _sliced(context, builder, kind, value, signature.args[1], index)
    return _make(context, builder, kind, builder.gep(data, [builder.mul(start, word(_SIZE))]), [length])


@lower_builtin(operator.setitem, Stack, types.SliceType, Lanes)
def _fill(context, builder, signature, arguments):
    kind, (value, index, lanes) = signature.args[0], arguments
    start, length, data, row = _sliced(context, builder, kind, value, signature.args[1], index)
    size = builder.mul(row, word(_SIZE))
    with cgutils.for_range(builder, builder.mul(length, row)) as loop:
        offset = builder.add(builder.mul(start, size), builder.mul(loop.index, word(_SIZE)))
        builder.store(lanes, _place(builder, builder.gep(data, [offset])), align=8)
    return context.get_dummy_value()


def _sliced(context, builder, kind, value, index_kind, index):
    """The first of the rows in a slice, their number, the data, and how many entries a row has."""
    data, (rows, *columns) = _opened(context, builder, kind, value)
    part = context.make_helper(builder, index_kind, value=index)
    fix_slice(builder, part, rows)
    length = builder.sub(part.stop, part.start)
    length = builder.select(builder.icmp_signed(">", length, word(0)), length, word(0))
    return part.start, length, data, columns[0] if columns else word(1)


def _lane_address(context, builder, signature, arguments):
    """Where the number of one problem lies, of arguments that begin with a stack, an index and a lane."""
    (kind, index_kind, lane_kind, *_), (value, index, lane, *_) = signature.args, arguments
    address, _ = _address(context, builder, kind, value, index_kind, index)
    offset = builder.mul(context.cast(builder, lane, lane_kind, types.int64), word(8))
    return builder.bitcast(builder.gep(address, [offset]), _DOUBLE.as_pointer())


@intrinsic
def put(typing_context, stack, index, lane, value):
    """Set the number of one problem in an entry."""

    def generate(context, builder, signature, arguments):
        number = context.cast(builder, arguments[3], signature.args[3], types.float64)
        builder.store(number, _lane_address(context, builder, signature, arguments))
        return context.get_dummy_value()

    return types.void(stack, index, lane, value), generate


@intrinsic
def take(typing_context, stack, index, lane):
    """The number of one problem in an entry."""

    def generate(context, builder, signature, arguments):
        return builder.load(_lane_address(context, builder, signature, arguments))

    return types.float64(stack, index, lane), generate
