# SPDX-License-Identifier: Apache-2.0
"""Whether a task belongs to a base: the fingerprint of the weights that it masks."""

from __future__ import annotations

import warnings

import torch

from ..storage import fingerprint, tensor_digest
from ..tuner.base_name import base_name
from .live import LiveModel
from .task import Task

__all__ = ["BaseCheck"]


class BaseCheck:
    """Compares tasks with a base whose weights are hashed once. Safe from any thread."""

    def __init__(self, live: LiveModel) -> None:
        """Nothing is hashed before the first task comes."""
        self._live = live
        self._digests: dict[tuple[str, torch.dtype], str] = {}

    def __call__(self, task: Task) -> None:
        """Refuse a task of another base; its adapter's ``check_base=False`` overrides.

        Args:
            task: The task, with its adapter's config as `info`.

        Raises:
            ValueError: If the fingerprints differ; names both bases.
        """
        expected = task.info.get("base_fingerprint")
        if expected is None or not task.info.get("check_base", True):
            return
        base = self._live.model
        wanted = [(name, base.get_parameter(name).dtype) for name in task.masks]
        for name, dtype in wanted:
            if (name, dtype) not in self._digests:
                self._digests[name, dtype] = tensor_digest(self._live.values(name))
        present = fingerprint((self._digests[key] for key in wanted), wanted[0][1])
        if present == expected:
            return
        names = f"made for {task.info.get('base_model_name_or_path') or 'a base without a name'} ({expected}), this "
        names += f"bank's base is {base_name(base) or type(base).__name__} ({present})"
        if str(expected).partition(":")[0] == present.partition(":")[0]:
            raise ValueError(
                f"Task {task.name!r} does not belong to this base model: {names}. Open the bank over the base that "
                "the adapter names; check_base=false in its adapter_config.json overrides the check."
            )
        warnings.warn(f"Task {task.name!r} cannot be verified in another dtype: {names}.", stacklevel=4)
