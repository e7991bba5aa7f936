# SPDX-License-Identifier: Apache-2.0
"""Refuse features with NaN or infinite values, saying how many rows and which comes first."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["require_finite_rows"]


def require_finite_rows(features: Tensor, what: str) -> None:
    """Check features (n, dim).

    Raises:
        ValueError: If a row holds NaN or infinity; `what` names the features.
    """
    bad = ~torch.isfinite(features).all(dim=1)
    if bool(bad.any()):
        rows = bad.nonzero().squeeze(1)
        raise ValueError(
            f"{what}: {len(rows)} of {len(features)} rows hold NaN or infinity, the first is row {int(rows[0])}. The "
            "model diverged or overflowed: extract in fp32 (no autocast), or train at lower learning rates."
        )
