# SPDX-License-Identifier: Apache-2.0
"""`PeftModel.push_to_hub` of a model with masks pushes this package's card.

PeftModel has the method from transformers' mixin, which writes a placeholder card after all that a tuner can override:
it would not say to import this package, without which PEFT cannot load the adapter. Other models are left alone.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from peft import PeftModel

from .tuner import MaskConfig


def register() -> None:
    """Give `PeftModel` the method, once."""
    original = PeftModel.push_to_hub
    if getattr(original, "pushes_masks", False):
        return

    @wraps(original)
    def push_to_hub(self: PeftModel, repo_id: str, **kwargs: Any) -> Any:
        if not all(isinstance(config, MaskConfig) for config in self.peft_config.values()):
            return original(self, repo_id, **kwargs)
        from .hub import push_model  # here, so that importing the package stays light

        kwargs.pop("max_shard_size", None)  # a mask is one file
        return push_model(self, repo_id, **kwargs)

    push_to_hub.pushes_masks = True  # type: ignore[attr-defined]
    PeftModel.push_to_hub = push_to_hub  # type: ignore[method-assign, assignment]
