"""The process's own memory: glibc's heap and Python's garbage collector, set up for a program that lives long.

What glibc does with memory that is freed decides a sixth of an update's time on CPU, where XLA's work spaces come from
its heap. Where the C library is another, or the environment has settings for malloc, nothing changes.
"""

import ctypes
import gc
import os
import sys
from collections.abc import Callable

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # of glibc's malloc.h
_GROWTH_BYTES = 1 << 28
_held_bytes = 0  # when freed memory had been given back last


def keep_freed_memory() -> None:
    """Has glibc keep large blocks that are freed, where it would give them back to the system at once.

    On CPU they are programs' work spaces, gigabytes in each micro-batch, whose pages the system makes and clears again
    at their next use. To be called before JAX has threads, so that they allocate from the same heap.
    """
    if mallopt := _of_glibc("mallopt"):
        for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 1 << 26)):
            mallopt(option, value)


def give_back_freed_memory() -> None:
    """Gives what is free by now back to the system, also between blocks in use: what is used again is made again.

    Not where the process has hardly grown since the last time: of a small model there is little to give back, and
    looking for it takes some 20 ms.
    """
    global _held_bytes
    trim = _of_glibc("malloc_trim")
    if trim and resident_bytes() > _held_bytes + _GROWTH_BYTES:
        trim(0)
        _held_bytes = resident_bytes()


def freeze() -> None:
    """Keeps all objects that there are out of garbage collections, which stop every thread.

    Loading and compiling leave half a million: a full collection took a quarter of a second, every few seconds under
    load.
    """
    gc.collect()
    gc.freeze()


def resident_bytes() -> int:
    """What the process holds in memory, by Linux's /proc."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _of_glibc(name: str) -> Callable | None:
    """A function of it; None where the heap is not to be changed."""
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return None
    return getattr(ctypes.CDLL(None), name, None)
