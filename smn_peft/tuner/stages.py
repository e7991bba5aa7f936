# SPDX-License-Identifier: Apache-2.0
"""`stage_targets`: what lies in the first stages of a network, for masks on these alone (the paper's Figure 8)."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from .architectures import exact_targets, matching_names
from .targets import resolve_targets

__all__ = ["stage_of", "stage_targets"]

# Outermost first: "layer2.0.conv1" lies in the stage "layer" 2, "stages.1.blocks.0.conv1" in "stages" 1.
_STAGE = re.compile(r"(?:^|\.)(layer|layers|stage|stages|blocks?|resblocks)[._]?(\d+)\.")


def stage_of(name: str) -> int | None:
    """Number of the stage in a module's name as the model counts it, or of the block where there are no stages.

    "layer1.0.conv1" gives 1, "stages.0.blocks.2.conv1" and "blocks.0.attn.qkv" give 0, "conv1" None: the stem belongs
    to no stage.
    """
    found = _STAGE.search(name)
    return None if found is None else int(found[2])


def stage_targets(model: nn.Module, target_modules: str | Iterable[str] | None, stages: int) -> str | list[str]:
    """Those of the targets that lie in the first stages; the stem lies in none.

    Args:
        model: The base model.
        target_modules: As of `MaskConfig`.
        stages: How many stages to take: of ResNet-50's four the first has 0.9 % of the convolutions' weights.

    Raises:
        ValueError: The targets lie in no numbered stages, or there are fewer than `stages`.
    """
    names = matching_names(model, resolve_targets(model, target_modules))
    numbers = sorted({number for name in names if (number := stage_of(name)) is not None})
    if not 1 <= stages <= len(numbers):
        raise ValueError(
            f"mask_stages={stages}: the targets lie in {len(numbers)} numbered stages or blocks, such as "
            f"{names[0] if names else 'none'!r}."
        )
    return exact_targets(model, [name for name in names if stage_of(name) in numbers[:stages]])
