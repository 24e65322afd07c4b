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


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)  # threads do not survive a fork


@cache
def _controller():
    """Return what sets the number of threads, or None where threadpoolctl is not installed."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return None
    return ThreadpoolController()


_lock = threading.Lock()
_users = 0
_limit: Any = None


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Hold BLAS to one thread a call, from when the first of any Python threads enters until the last has left."""
    global _users, _limit
    if _controller() is None:
        yield
        return
    with _lock:
        if _users == 0:
            _release_control()
            _limit = _controller().limit(limits=1, user_api="blas")
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
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


@contextmanager
def single_threaded() -> Iterator[None]:
    """Hold what is called in this context to one thread, for tasks of a scheduler that has threads of its own."""
    token = THREADS.set(1)
    try:
        with single_threaded_blas():
            yield
    finally:
        THREADS.reset(token)
