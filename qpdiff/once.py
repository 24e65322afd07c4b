"""Attributes that are computed when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")


class cached_property(Generic[T]):
    """An attribute whose value is that of a method, stored at its first use; two threads may both compute it.

    `functools.cached_property` of Python 3.11 has a lock that all objects share: it makes threads wait for each other,
    and for ever in the child of a fork that came while another thread held it.
    """

    def __init__(self, function: Callable[[Any], T]):
        self.function = function
        self.__doc__ = function.__doc__

    def __set_name__(self, owner, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner) -> cached_property[T]: ...
    @overload
    def __get__(self, instance: object, owner) -> T: ...
    def __get__(self, instance, owner):
        if instance is None:
            return self
        value = instance.__dict__[self.name] = self.function(instance)
        return value


class cached_field(cached_property[T]):
    """A `cached_property` that is a field of a dataclass too: a value that its constructor is given takes its place.

    The constructor's default is None, what dataclasses find where they look for one.
    """

    def __get__(self, instance, owner):
        return None if instance is None else super().__get__(instance, owner)
