# SPDX-License-Identifier: Apache-2.0
"""Table 7: masks and fine-tuned weights under compressors; in the paper for SUN397."""

from __future__ import annotations

from .artefact import Artefact
from .compression import NOTE, cells_of, details_of

__all__ = ["ARTEFACT"]

_PAPER = {
    "Reduction in percent, SUN397": {
        "gzip": {"masks": 0.8125, "fp32 weights": 0.0699},
        "bz2": {"masks": 0.8211, "fp32 weights": 0.0469},
        "lzma": {"masks": 0.8332, "fp32 weights": 0.0769},
        "lz4": {"masks": 0.6252, "fp32 weights": -0.0039},
        "snappy": {"masks": 0.6654, "fp32 weights": -0.000046},
    }
}

ARTEFACT = Artefact(
    "table7",
    "Table 7: compression, SUN397 in the paper",
    cells_of("table7"),
    _PAPER,
    note=NOTE,
    details=details_of("table7"),
    seeds=1,
)
