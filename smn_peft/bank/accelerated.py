# SPDX-License-Identifier: Apache-2.0
"""The dense write compiled by numba (extra ``fast``), where it is installed; without it numpy gives the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from ..functional.compiled import compiled

__all__ = ["fast_write"]


def fast_write() -> Callable[[NDArray[Any], NDArray[Any], NDArray[Any], Any], None] | None:
    """The compiled write, of ``(out, weight, packed, scale)``; None without numba. The first call takes a second.

    `out` and `weight` are (N,), floating-point or the bits of such as integers; `packed` is uint8 (⌈N/8⌉,); `scale` is
    of the same type, 1 for integers.
    """
    return compiled(_write)


def _write(out: Any, weight: Any, packed: Any, scale: Any) -> None:
    whole, zero = len(out) // 8, out.dtype.type(0)
    for byte in range(whole):
        bits = packed[byte]
        for bit in range(8):
            value = weight[8 * byte + bit] * scale
            out[8 * byte + bit] = value if (bits >> (7 - bit)) & 1 else zero
    for index in range(8 * whole, len(out)):
        value = weight[index] * scale
        out[index] = value if (packed[whole] >> (7 - index % 8)) & 1 else zero
