# SPDX-License-Identifier: Apache-2.0
"""Where a run starts that goes on from another one's weights, and which images it is restricted to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..storage import check_regular
from .checkpoint import file_digest, latest_checkpoint, load_tensors
from .task import TrainingTask

__all__ = ["read_indices", "start_digest", "start_from"]


def start_from(task: TrainingTask, folder: str | Path) -> None:
    """Give a task the scores, head, prototypes and statistics of another run's newest checkpoint.

    Optimizer, step and what an objective keeps for one run only (`Objective.run_state`: SwAV's queue) start anew.

    Args:
        task: Of the same model, mask and objective.
        folder: The other run's `output_dir`.

    Raises:
        FileNotFoundError: If it holds no checkpoint.
        ValueError: If the checkpoint is of another model, mask or objective.
    """
    path = _checkpoint(folder)
    own = {f"objective.{name}" for name in task.objective.run_state}
    tensors = {name: tensor for name, tensor in task.training_state().items() if name not in own}
    fix = "It must be a run of the same backbone, mask and objective options as this one."
    load_tensors(path, tensors, fix, ignore=own)


def start_digest(folder: str | Path) -> str:
    """SHA-256 of what [`start_from`] would read, as hex, by which a run knows its start again.

    Raises:
        FileNotFoundError: If the folder holds no checkpoint.
    """
    return file_digest(_checkpoint(folder) / "model.safetensors")


def _checkpoint(folder: str | Path) -> Path:
    path = latest_checkpoint(folder)
    if path is None:
        raise FileNotFoundError(
            f"init_from={folder} holds no checkpoint, and an adapter alone has no scores to start from: name the "
            "output_dir of a run with keep_checkpoints of 1 or more."
        )
    return path


def read_indices(path: str | Path, count: int) -> Tensor:
    """Image numbers from a ``.npy`` file of integers.

    Args:
        path: The file.
        count: Number of images that there are.

    Returns:
        int64 (n,), in the file's order.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds anything but numbers from 0 to `count` − 1, each once at most.
    """
    try:
        check_regular(path)
        found = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"indices_file={path} does not exist.") from None
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"indices_file={path} is not a .npy file of integers: {error}") from error
    if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype.kind not in "iu" or not len(found):
        shown = f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else "several arrays"
        raise ValueError(f"indices_file={path} must hold one row of integers, one at least; it holds {shown}.")
    if found.min() < 0 or found.max() >= count or len(np.unique(found)) < len(found):
        raise ValueError(
            f"indices_file={path} must hold each number once at most, from 0 to {count - 1}, the images that limit "
            f"and fraction leave; it holds {len(found)} from {found.min()} to {found.max()}."
        )
    return torch.from_numpy(found.astype(np.int64))
