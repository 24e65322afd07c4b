"""The choice of the library: that of the arrays, or the one that was named."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, NamedTuple

import array_api_compat.numpy
import numpy as np

from .base import Backend


class _Library(NamedTuple):
    namespace: str
    backend: tuple[str, str]
    """The module of its backend in this package, and the class."""
    extras: tuple[str, ...]


_LIBRARIES = {
    "numpy": _Library("array_api_compat.numpy", (".numpy", "NumPyBackend"), ()),
    "cupy": _Library("array_api_compat.cupy", (".cupy", "CuPyBackend"), ("cuda12", "cuda13")),
    "torch": _Library("array_api_compat.torch", (".torch", "TorchBackend"), ("torch",)),
    "jax": _Library("jax.numpy", (".jax", "JAXBackend"), ("jax",)),
}


_DOUBLE = np.dtype(np.float64)


@cache
def _kind(namespace) -> type[Backend]:
    """Return the class of the backends of a namespace."""
    for library in _LIBRARIES.values():
        if library.namespace == namespace.__name__:
            module, name = library.backend
            return getattr(importlib.import_module(module, __package__), name)
    return Backend


@cache
def _backend(namespace, device=None) -> Backend:
    """Return the one backend of a namespace on a device."""
    return _kind(namespace)(namespace, device)


def choose_backend(operands, name=None):
    """Choose the backend for the caller's operands; return it, and the operands as its arrays.

    Parameters
    ----------
    operands : dict
        Arrays, lists or scalars by name; none is None.
    name : str, optional
        "numpy", "cupy", "torch" or "jax" to move the data there. By default the operands stay in their library; lists
        and scalars go where the arrays are, and to NumPy where there is no array.

    Raises
    ------
    TypeError, ValueError
        For an operand that is no array, for operands of several libraries or devices, for an unknown name.
    ImportError
        For a library that is not installed; the message names the extra to install.
    """
    # What comes next would take most of a small solve.
    known = all(type(value) is np.ndarray and value.dtype is _DOUBLE for value in operands.values())
    if known and (name is None or name == "numpy"):
        return _numpy_backend(), dict(operands)
    return _keep_all(operands) if name is None else _move_all(operands, name)


def _move_all(operands, name):
    """Choose the backend of a library; return it, and the operands moved there."""
    xp = _namespace(name)
    kind = _kind(xp)
    own = {key: value for key, value in operands.items() if kind.owns(value, xp)}
    there = {key: kind.device_of(value) for key, value in own.items()}
    devices = set(there.values())
    if len(devices) > 1:
        _check_one_device(there)
    backend = _backend(xp, devices.pop() if devices else kind.current_device(xp))
    if name == "numpy":  # of NumPy's arrays some are of kinds that are refused
        own = {}
    if len(own) == len(operands):
        return backend, own
    return backend, {k: own[k] if k in own else _move(k, v, backend, name) for k, v in operands.items()}


def _keep_all(operands):
    """Choose the backend of the operands' library; return it, and the operands, with lists and numbers moved there."""
    arrays = {
        key: value for key, value in operands.items() if not isinstance(value, (int, float, list, tuple, np.generic))
    }
    if all(type(value) is np.ndarray for value in arrays.values()):
        backend = _numpy_backend()
        return backend, {key: from_host(key, value, backend) for key, value in operands.items()}
    namespaces, devices = {}, {}
    for key, value in arrays.items():
        try:
            namespaces[key] = array_api_compat.array_namespace(value)
        except TypeError as error:
            raise TypeError(
                f"{key} is a {type(value).__module__}.{type(value).__name__}; expected an array of a library that "
                "follows the array API standard, a list or a number"
            ) from error
        devices[key] = _kind(namespaces[key]).device_of(value)
    first = next(iter(arrays))
    for key in arrays:
        if namespaces[key] is not namespaces[first]:
            library, other = (_library_name(namespaces[k]) for k in (key, first))
            raise TypeError(
                f"{key} is an array of {library} but {first} one of {other}; convert one of them, or pass backend= to "
                "move all"
            )
    _check_one_device(devices)
    if array_api_compat.is_numpy_namespace(namespaces[first]):
        backend = _numpy_backend()
        return backend, {key: from_host(key, value, backend) for key, value in operands.items()}
    backend = _backend(namespaces[first], devices[first])
    return backend, {key: value if key in arrays else from_host(key, value, backend) for key, value in operands.items()}


def _check_one_device(devices) -> None:
    first = next(iter(devices), None)
    for key, device in devices.items():
        if device != devices[first]:
            raise ValueError(f"{key} is on device {device} but {first} on {devices[first]}; move all to one device")


@cache
def _numpy_backend() -> Backend:
    return _backend(array_api_compat.numpy)


class Types(NamedTuple):
    """Floating point types of a problem."""

    working: Any
    """The one to compute in."""
    result: Any
    """That of the results."""


class Kind(NamedTuple):
    """The type of an operand."""

    name: str
    dtype: Any
    typed: bool
    """False for lists and numbers, whose floating point type is not the caller's choice."""


def kinds_of(arrays, operands) -> list[Kind]:
    """Return the types of operands, from their arrays and what the caller gave."""
    return [Kind(name, value.dtype, hasattr(operands[name], "dtype")) for name, value in arrays.items()]


def read_dtype(dtype) -> str | None:
    """Read the caller's choice of a floating point type.

    Raises
    ------
    ValueError
        For one that is neither float32 nor float64.
    """
    if dtype is None:
        return None
    if _name(dtype) not in ("float32", "float64"):
        raise ValueError(f"dtype is {dtype!r}; expected 'float32' or 'float64'")
    return _name(dtype)


def floating_types(backend, kinds: list[Kind], dtype: str | None = None) -> Types:
    """Choose the types to compute in and return: the given one, else float64; float32 if every floating array is."""
    xp = backend.xp
    floating = set()
    for name, kind, typed in kinds:
        if kind in (xp.float32, xp.float64) and typed:
            floating.add(kind)
            continue
        if not xp.isdtype(kind, ("real floating", "integral", "bool")):
            raise TypeError(f"{name} has dtype {_name(kind)}; expected real numbers")
        if xp.isdtype(kind, "real floating") and typed:
            if dtype is None:
                raise TypeError(
                    f"{name} has dtype {_name(kind)}; expected float32 or float64, or pass dtype= to convert"
                )
            floating.add(kind)
    if dtype is None:
        single = floating and all(kind == xp.float32 for kind in floating)
        return Types(backend.widest_float, xp.float32 if single else backend.widest_float)
    wanted = getattr(xp, dtype)
    if wanted not in (xp.float32, backend.widest_float):
        raise ValueError(f"dtype is {dtype}, which {_library_name(xp)} has switched off")
    return Types(wanted, wanted)


def _library_name(xp):
    return xp.__name__.removeprefix("array_api_compat.")


def _name(dtype):
    """Return the name of a floating point type without its library: torch.float32, <class 'numpy.float32'>, ..."""
    return str(dtype).rsplit(".", 1)[-1].strip("'>")


def _namespace(name):
    if not isinstance(name, str) or name not in _LIBRARIES:
        raise ValueError(f"backend is {name!r}; expected one of {', '.join(map(repr, _LIBRARIES))} or None")
    try:
        return importlib.import_module(_LIBRARIES[name].namespace)
    except ImportError as error:
        install = " or ".join(f"pip install 'qpdiff[{extra}]'" for extra in _LIBRARIES[name].extras)
        raise ImportError(f"backend={name!r} needs a package that is missing: {install}") from error


def from_host(key, value, backend):
    """Bring a list, a number or a NumPy array of any kind to the backend; copy only where that is needed."""
    if type(value) is np.ndarray and value.dtype.kind == "f" and value.dtype.isnative:
        return backend.asarray(value)
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{key} is a masked array; expected one without a mask, so fill the masked entries first")
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged lists, and lists of arrays of another device
        raise ValueError(f"{key} is not a regular array: {error}") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{key} has dtype {array.dtype}; expected real numbers")
    return backend.asarray(array.astype(array.dtype.newbyteorder("="), copy=False))


def _move(key, value, backend, name):
    if isinstance(value, np.ndarray) or not hasattr(value, "__dlpack__"):
        return from_host(key, value, backend)
    refusals = (AttributeError, BufferError, RuntimeError, TypeError, ValueError)
    try:
        return backend.asarray(backend.xp.from_dlpack(value))
    except refusals as error:
        try:  # by way of the host, since DLPack does not move between it and a GPU
            return backend.asarray(np.from_dlpack(array_api_compat.to_device(value, "cpu")))
        except refusals:
            kind = f"{type(value).__module__}.{type(value).__name__}"
            raise TypeError(f"{key} is a {kind}, which does not move to backend={name!r}: {error}") from error
