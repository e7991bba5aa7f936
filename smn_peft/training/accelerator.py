# SPDX-License-Identifier: Apache-2.0
"""`build_accelerator`: accelerate's side of a run, and the refusal of processes that do not know of each other."""

from __future__ import annotations

import os

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from .loop_arguments import LoopArguments

__all__ = ["build_accelerator"]


def build_accelerator(arguments: LoopArguments) -> Accelerator:
    """The accelerator that a run's arguments ask for.

    Raises:
        ValueError: If several processes were started that would each train alone, into one folder.
    """
    accelerator = Accelerator(
        cpu=arguments.cpu,
        mixed_precision=arguments.mixed_precision,
        gradient_accumulation_steps=arguments.accumulate,
        log_with=arguments.log_with,
        project_dir=arguments.output_dir,
        # Statistics are per adapter and synchronised where they are made; the frozen ones never differ.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    started = os.environ.get("WORLD_SIZE", "1")
    if started != str(accelerator.num_processes):
        raise ValueError(
            f"{started} processes were started (WORLD_SIZE), but accelerate has {accelerator.num_processes} on "
            f"{accelerator.device}, so each would train alone into {arguments.output_dir}. Pass --cpu (cpu=True) "
            "where there is no GPU for each; unset WORLD_SIZE if this is the only process."
        )
    return accelerator
