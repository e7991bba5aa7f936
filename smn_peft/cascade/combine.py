# SPDX-License-Identifier: Apache-2.0
"""One embedding of several masks' features: side by side, all of them or the routed expert's alone (Eqs. 10, 11)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["conditional", "unconditional"]


def unconditional(dispatcher: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """``[D(x), E_1(x), …, E_K(x)]`` (Eq. 10).

    Args:
        dispatcher: (n, F).
        experts: K of (n, F).

    Returns:
        (n, (K + 1) F).
    """
    return torch.cat([dispatcher, *experts], 1)


def conditional(dispatcher: Tensor, experts: Sequence[Tensor], route: Tensor) -> Tensor:
    """``[D(x), 0, …, E_R(x), …, 0]`` (Eq. 11): as [`unconditional`], other experts' features zero.

    Args:
        dispatcher: (n, F).
        experts: K of (n_k, F), the features of the images that are routed to each, in order.
        route: int64 (n,), the expert of each image.

    Returns:
        (n, (K + 1) F).
    """
    dim = dispatcher.shape[1]
    found = dispatcher.new_zeros(len(dispatcher), (len(experts) + 1) * dim)
    found[:, :dim] = dispatcher
    for number, features in enumerate(experts):
        rows = (route == number).nonzero().squeeze(1)
        found[rows, (number + 1) * dim : (number + 2) * dim] = features
    return found
