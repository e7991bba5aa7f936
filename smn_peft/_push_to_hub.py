# SPDX-License-Identifier: Apache-2.0
"""`PeftModel.push_to_hub` for masks: the card of the package in the place of the one that transformers puts over it.

PeftModel takes the method from transformers' mixin, which saves the adapter with PEFT's card and then writes a
placeholder over that card ("a transformers model"), with no hook in between. Who pulls from such a page is not told
to import this package, without which PEFT cannot load the adapter. Models without masks are passed on untouched.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from peft import PeftModel

from .tuner import MaskConfig

__all__ = ["register"]


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
