# SPDX-License-Identifier: Apache-2.0
"""`compiled`: a loop over arrays compiled by numba, where the extra ``fast`` is installed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["compiled"]


@functools.cache
def compiled(function: Callable[..., Any], fastmath: frozenset[str] = frozenset()) -> Callable[..., Any] | None:
    """The function without the interpreter and its lock, or None without numba. The first call of the result compiles.

    It runs in the calling thread: threads of numba's own would compete with torch's.

    Args:
        function: Loops over numpy arrays and numbers.
        fastmath: Freedoms of LLVM's, such as "contract"; none gives the same bits as the interpreter.
    """
    try:
        from numba import njit
    except ImportError:
        return None
    result: Callable[..., Any] = njit(nogil=True, fastmath=set(fastmath))(function)
    return result
