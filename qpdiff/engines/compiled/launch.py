"""The arguments of the kernels on a GPU, as src/launch.hpp has them, which says what each field is."""

from __future__ import annotations

import ctypes
from typing import Any

from ...problem import OPERANDS, PRICED
from ..base import Outcome, Settings
from .engine import _core


def _struct(name: str, **kinds) -> Any:
    return type(name, (ctypes.Structure,), {"_fields_": list(kinds.items())})


_Pointer, _Int, _Double = ctypes.c_void_p, ctypes.c_int, ctypes.c_double
ParameterStruct = _struct("Parameters", **dict.fromkeys(_core.PARAMETERS, _Double))
_KINDS = {"absolute": ctypes.c_bool, "max_iterations": _Int}
SettingsStruct = _struct("Settings", **{name: _KINDS.get(name, _Double) for name in Settings._fields})
OperandArray = _struct("OperandArray", data=_Pointer, stride=ctypes.c_longlong)
PriceArrays = _struct("PriceArrays", **dict.fromkeys(PRICED, OperandArray))
OperandArrays = _struct(
    "OperandArrays",
    **dict.fromkeys(OPERANDS, OperandArray),
    **dict.fromkeys(("price_of_A", "price_of_G", "price_of_bounds"), PriceArrays),
)
BlockShape = _struct(
    "BlockShape", **dict.fromkeys(("form", "n", "p", "m", "lower", "upper", "priced", "reserved"), _Int)
)
StoredArrays = _struct(
    "StoredArrays",
    **dict.fromkeys(("constant", "last", "scaling", "form", "factor_ok"), _Pointer),
    constant_stride=ctypes.c_longlong,
)
BlockMemory = _struct(
    "BlockMemory", workspace=_Pointer, workspace_bytes=ctypes.c_longlong, shared_bytes=_Int, reserved=_Int
)
SolveLaunch = _struct(
    "SolveLaunch", parameters=ParameterStruct, settings=SettingsStruct, operands=OperandArrays, shape=BlockShape,
    count=_Int, check=_Int, rounding=_Double, start_x=_Pointer, start_v=_Pointer, start_usable=_Pointer,
    **dict.fromkeys(Outcome._fields, _Pointer), refused=_Pointer, stored=StoredArrays, memory=BlockMemory,
)  # fmt: skip
DerivativeLaunch = _struct(
    "DerivativeLaunch", parameters=ParameterStruct, operands=OperandArrays, shape=BlockShape, count=_Int, reserved=_Int,
    fill=_Double, x=_Pointer, v=_Pointer, s=_Pointer, status=_Pointer, r_x=OperandArray, r_v=OperandArray,
    u_x=_Pointer, u_v=_Pointer, of_Q=_Pointer, of_A=_Pointer, of_G=_Pointer, stored=StoredArrays, memory=BlockMemory,
)  # fmt: skip
