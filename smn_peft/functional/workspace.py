# SPDX-License-Identifier: Apache-2.0
"""`Workspace`: memory on the CPU that is written anew in every step, kept between steps."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

__all__ = ["Workspace", "is_plain"]


class Workspace(threading.local):
    """Memory on the CPU that the nodes of one thread share; fresh pages would cost more than writing to them."""

    def __init__(self) -> None:
        self.blocks: dict[torch.dtype, Tensor] = {}
        self.views: dict[torch.dtype, dict[torch.Size, Tensor]] = {}
        self.zeros: dict[torch.dtype, Tensor] = {}

    def room(self, like: Tensor) -> Tensor:
        """Uninitialised tensor of the shape and dtype of `like`, valid until the next call with this dtype."""
        views = self.views.setdefault(like.dtype, {})
        if (view := views.get(like.shape)) is None:
            block = self.blocks.get(like.dtype)
            with torch.inference_mode(False):
                if block is None or block.numel() < like.numel():
                    block = self.blocks[like.dtype] = torch.empty(like.numel(), dtype=like.dtype, device="cpu")
                    views.clear()  # they hold the smaller block
                view = views[like.shape] = block[: like.numel()].view(like.shape)
        return view

    def zero(self, dtype: torch.dtype) -> Tensor:
        """A 0-dim zero."""
        if dtype not in self.zeros:
            with torch.inference_mode(False):
                self.zeros[dtype] = torch.zeros((), dtype=dtype, device="cpu")
        return self.zeros[dtype]


def is_plain(*tensors: Tensor) -> bool:
    """Whether the tensors lie in the CPU's memory in C order, and are what they seem (not a tracer's stand-ins)."""
    return all(type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.is_contiguous() for t in tensors)
