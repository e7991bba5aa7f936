# SPDX-License-Identifier: Apache-2.0
"""`usable`: kernels of Triton where it is there and can compile them; without it torch's own passes serve."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

__all__ = ["usable"]

_Kernels = TypeVar("_Kernels")


def usable(load: Callable[[], _Kernels], purpose: str) -> _Kernels | None:
    """What `load` gives, or None: without a word if Triton is missing, with a warning if it fails.

    Args:
        load: Imports kernels and tries them on a few weights; Triton needs a C compiler for it.
        purpose: What they are for, for the warning.
    """
    try:
        return load()
    except ImportError:
        return None
    except Exception as error:
        warnings.warn(f"Triton cannot compile {purpose}, torch's passes are slower: {error}", stacklevel=2)
        return None
