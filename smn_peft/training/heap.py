# SPDX-License-Identifier: Apache-2.0
"""`held_heap`: memory that is freed stays with the process while it trains on a CPU."""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["held_heap"]

# Of malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
#: What glibc comes to by itself, once a block of 32 MiB was freed; its defaults cannot be had again.
_AFTER = {_TRIM_THRESHOLD: 64 << 20, _MMAP_THRESHOLD: 32 << 20, _MMAP_MAX: 65536}


@functools.cache
def _glibc() -> Any | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


@contextmanager
def held_heap(enabled: bool = True) -> Iterator[None]:
    """Keep freed memory in the process until the end, and give it back then.

    A training step frees what the next one asks for again. glibc returns the larger blocks to the kernel, which clears
    them page by page at their next use: a tenth of a ResNet's step. The peak is what it was; other C libraries, and
    allocators that are loaded before glibc's, are left as they are.

    Args:
        enabled: False does nothing, as on a GPU.
    """
    libc = _glibc() if enabled else None
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        for option, value in _AFTER.items():
            libc.mallopt(option, value)
        libc.malloc_trim(0)
