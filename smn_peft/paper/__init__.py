# SPDX-License-Identifier: Apache-2.0
"""Every table and figure of the paper as data: the runs it needs, how they become it, the paper's numbers."""

from __future__ import annotations

from .artefact import Artefact, Cell
from .listing import ARTEFACTS, SCALES, artefact_named, listing, scale_named
from .reproduce import Reproduction, needed_runs, reproduce
from .run_spec import RunSpec
from .scale import Scale, Setting
from .store import RunStore

__all__ = [
    "ARTEFACTS",
    "SCALES",
    "Artefact",
    "Cell",
    "Reproduction",
    "RunSpec",
    "RunStore",
    "Scale",
    "Setting",
    "artefact_named",
    "listing",
    "needed_runs",
    "reproduce",
    "scale_named",
]
