# SPDX-License-Identifier: Apache-2.0
"""`images_of_run`: the images of a run, which without labels is not evaluated where its objective needs none."""

from __future__ import annotations

import warnings
from dataclasses import replace

from ..data import NoLabelsError
from .images import Images, build_images
from .objective import objective_kind
from .train_arguments import TrainArguments

__all__ = ["images_of_run"]


def images_of_run(arguments: TrainArguments) -> tuple[TrainArguments, Images]:
    """What `build_images` opens; where only the evaluation lacks labels, a warning and a run without one.

    Returns:
        The arguments, with the `eval_split` that was taken, None in that case, and the images.

    Raises:
        ValueError: As `build_images`.
    """
    try:
        images = build_images(arguments)
        return replace(arguments, eval_split=images.eval_split), images
    except NoLabelsError as error:
        if objective_kind(arguments).needs_labels or arguments.eval_split is None:
            raise
        unevaluated = replace(arguments, eval_split=None, eval_fraction=None)
        images = build_images(unevaluated)
        reason = str(error).partition(": ")[0]
        warnings.warn(f"{reason}: nothing is evaluated, as with --eval-split none.", stacklevel=3)
        return unevaluated, images
