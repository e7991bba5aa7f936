# SPDX-License-Identifier: Apache-2.0
"""Whether a forward runs on real tensors, or on stand-ins of torch.func, a tracer or an exporter."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["is_exporting", "is_transformed"]

is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # torch < 2.7 has none


def is_transformed() -> bool:
    """Whether torch.func or a tracer runs the code, which want plain operations and no autograd node of ours."""
    return torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None
