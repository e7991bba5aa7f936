# SPDX-License-Identifier: Apache-2.0
"""Table 6: masks and fine-tuned weights under compressors; in the paper for CIFAR-100."""

from __future__ import annotations

from .artefact import Artefact
from .compression import NOTE, cells_of, details_of

__all__ = ["ARTEFACT"]

_PAPER = {
    "Reduction in percent, CIFAR-100": {
        "gzip": {"masks": 0.7832, "fp32 weights": 0.0699},
        "bz2": {"masks": 0.7924, "fp32 weights": 0.0469},
        "lzma": {"masks": 0.8073, "fp32 weights": 0.0770},
        "lz4": {"masks": 0.5906, "fp32 weights": -0.0039},
        "snappy": {"masks": 0.6257, "fp32 weights": -0.000046},
    }
}

ARTEFACT = Artefact(
    "table6",
    "Table 6: compression, CIFAR-100 in the paper",
    cells_of("table6"),
    _PAPER,
    note=NOTE,
    details=details_of("table6"),
    seeds=1,
)
