"""The C library's heap, where a CPU's tensors live."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of <malloc.h>


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next tensor; elsewhere do nothing.

    It gives large blocks back to the system at once, and then every page of every activation is
    cleared and mapped anew: a fifth of the time of decoding a picture of 512x512. It is a setting
    of the whole process, which in turn keeps up to 2 GB at the heap's end, and what was freed
    between blocks in use until `give_back_freed_memory`.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed_memory() -> None:
    """Have glibc give what it keeps back to the system; elsewhere do nothing.

    Between parts whose tensors have other sizes: the second seldom fits into what the first left.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
