# SPDX-License-Identifier: Apache-2.0
"""Whether a task belongs to a base: the fingerprint of the weights that it masks."""

from __future__ import annotations

import warnings

from torch import nn

from ..storage import fingerprint, tensor_digest
from ..tuner.base_name import base_name
from .live import LiveModel
from .task import Task

__all__ = ["BaseCheck"]


class BaseCheck:
    """Compares tasks with a base whose weights are hashed once."""

    def __init__(self, base: nn.Module) -> None:
        """Nothing is hashed before the first task comes."""
        self._base = base
        self._digests: dict[str, str] = {}

    def __call__(self, task: Task, live: LiveModel) -> None:
        """Refuse a task of another base; its adapter's ``check_base=False`` overrides.

        Args:
            task: The task, with its adapter's config as `info`.
            live: The model; it goes back to the base's own weights if some of them have to be hashed.

        Raises:
            ValueError: If the fingerprints differ; names both bases.
        """
        expected = task.info.get("base_fingerprint")
        if expected is None or not task.info.get("check_base", True):
            return
        parameters = {name: self._base.get_parameter(name) for name in task.masks}
        if missing := parameters.keys() - self._digests.keys():
            live.switch(None)
            self._digests.update({name: tensor_digest(parameters[name]) for name in missing})
        dtype = next(iter(parameters.values())).dtype
        present = fingerprint((self._digests[name] for name in parameters), dtype)
        if present == expected:
            return
        names = f"made for {task.info.get('base_model_name_or_path') or 'a base without a name'} ({expected}), this "
        names += f"bank's base is {base_name(self._base) or type(self._base).__name__} ({present})"
        if str(expected).partition(":")[0] == present.partition(":")[0]:
            raise ValueError(
                f"Task {task.name!r} does not belong to this base model: {names}. Open the bank over the base that "
                "the adapter names; check_base=false in its adapter_config.json overrides the check."
            )
        warnings.warn(f"Task {task.name!r} cannot be verified in another dtype: {names}.", stacklevel=4)
