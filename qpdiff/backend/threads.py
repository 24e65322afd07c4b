"""The number of threads to work with, and one thread for BLAS while several of ours work."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

THREADS = ContextVar(
    "THREADS", default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
)
"""Threads for NumPy arrays: one a processor, unless `single_threaded` says otherwise."""


@cache
def pool() -> ThreadPoolExecutor:
    """Return the threads that stay, since to start one takes longer than to wake it."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="qpdiff")


@cache
def _controller():
    """Return what sets the number of threads, or None where threadpoolctl is not installed."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return None
    import scipy.linalg  # noqa: F401  whose BLAS is found only once it is loaded

    return ThreadpoolController()


_lock = threading.Lock()
_users: list[int] = []
"""The threads that are in the context, as often as each is."""
_limit: Any = None


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Hold BLAS to one thread a call, from when the first of any Python threads enters until the last has left."""
    global _limit
    if _controller() is None:
        yield
        return
    user = threading.get_ident()
    with _lock:
        if not _users:
            _release_control()
            _limit = _controller().limit(limits=1, user_api="blas")
        _users.append(user)
    try:
        yield
    finally:
        with _lock:
            _users.remove(user)
            if not _users:
                _lift_limit()


def _lift_limit() -> None:
    """Give BLAS back the number of threads that it had."""
    _release_control()
    _limit.restore_original_limits()
    _release_control()


def _release_control() -> None:
    """Let any thread set the number of OpenBLAS's threads.

    From version 3.8 on, threadpoolctl reserves that for the first thread that does, and ignores the others without a
    word. The thread that lifts our limit may be another than the one that set it.
    """
    from threadpoolctl import OpenBLASController

    if hasattr(OpenBLASController, "clear_controlling_thread"):
        OpenBLASController.clear_controlling_thread(force=True)


def _begin_in_child() -> None:
    """Forget the threads that the child of a fork does not have, one of which may have held the lock."""
    global _lock
    pool.cache_clear()
    _lock = threading.Lock()
    if _users:
        _users[:] = [user for user in _users if user == threading.get_ident()]
        if not _users:
            _lift_limit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_in_child)


@contextmanager
def single_threaded() -> Iterator[None]:
    """Hold what is called in this context to one thread, for tasks of a scheduler that has threads of its own."""
    token = THREADS.set(1)
    try:
        with single_threaded_blas():
            yield
    finally:
        THREADS.reset(token)
