# SPDX-License-Identifier: Apache-2.0
"""Whether a task belongs to a base: the fingerprints of the weights that it masks, and of all else it depends on."""

from __future__ import annotations

import warnings

import torch

from ..storage import fingerprint, tensor_digest
from ..tuner.checks import base_name, unmasked_tensors
from .live import LiveModel
from .task import Task

__all__ = ["BaseCheck"]


class BaseCheck:
    """Compares tasks with a base whose weights are hashed once. Safe from any thread."""

    def __init__(self, live: LiveModel) -> None:
        """Nothing is hashed before the first task comes."""
        self._live = live
        self._digests: dict[tuple[str, torch.dtype], str] = {}
        self._unmasked: dict[object, list[str]] = {}

    def __call__(self, task: Task) -> None:
        """Refuse a task of another base; its adapter's ``check_base=False`` overrides.

        Args:
            task: The task, with its adapter's config as `info`.

        Raises:
            ValueError: If the fingerprints differ; names both bases, and whether it is the masked weights or the rest.
        """
        if not task.info.get("check_base", True):
            return
        masked, rest = (task.info.get(f"{part}_fingerprint") for part in ("base", "unmasked"))
        if masked is not None:
            self._compare(task, "masked weights", str(masked), list(task.masks))
        if rest is not None:
            self._compare(task, "weights or statistics outside the mask", str(rest), self._names_outside(task))

    def _names_outside(self, task: Task) -> list[str]:
        saved = tuple(task.info.get("modules_to_save") or ())
        key = (frozenset(task.masks), task.info.get("batch_norm"), saved)
        if key not in self._unmasked:
            self._unmasked[key] = list(unmasked_tensors(self._live.model, task.masks.keys(), task.info))
        return self._unmasked[key]

    def _compare(self, task: Task, what: str, expected: str, names: list[str]) -> None:
        base = self._live.model
        wanted = [(name, self._live.dtype(name)) for name in names]
        for name, dtype in wanted:
            if (name, dtype) not in self._digests:
                self._digests[name, dtype] = tensor_digest(self._live.values(name))
        present = fingerprint((self._digests[key] for key in wanted), wanted[0][1] if wanted else torch.float32)
        if present == expected:
            return
        bases = f"made for {task.info.get('base_model_name_or_path') or 'a base without a name'} ({expected}), this "
        bases += f"bank's base is {base_name(base) or type(base).__name__} ({present})"
        if expected.partition(":")[0] == present.partition(":")[0]:
            raise ValueError(
                f"Task {task.name!r} does not belong to this base model, whose {what} differ: {bases}. Open the bank "
                "over the base that the adapter names; check_base=false in its adapter_config.json overrides the "
                "check."
            )
        warnings.warn(f"Task {task.name!r} cannot be verified in another dtype: {bases}.", stacklevel=5)
