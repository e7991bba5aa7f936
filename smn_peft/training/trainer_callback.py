# SPDX-License-Identifier: Apache-2.0
"""`ExactResumeCallback`: transformers' `Trainer` resumes a mask's scores exactly, not from its bits."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..tuner import MaskConfig


class ExactResumeCallback(TrainerCallback):
    """Keep the scores in the checkpoints of transformers' `Trainer`, and out of what is saved after training.

    The `Trainer` writes a checkpoint with `save_pretrained`, which stores one bit per weight, and resumes with
    `load_adapter(is_trainable=True)`, which has to invent the scores: the run continues from the same mask along
    another path. This callback switches ``save_scores`` on while training, so that checkpoints are 32 times larger and
    an interrupted run ends in the same mask. `trainer.save_model()` afterwards exports bits.

    ```python
    trainer = Trainer(model, arguments, callbacks=[ExactResumeCallback()], …)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model("adapter")
    ```
    """

    def __init__(self) -> None:
        self._before: list[tuple[MaskConfig, bool]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Switch ``save_scores`` on for every mask adapter that trains; a ValueError says if there is none."""
        self._restore()
        model: nn.Module | None = kwargs.get("model")
        configs = getattr(model, "peft_config", {}).values()
        masks = [config for config in configs if isinstance(config, MaskConfig) and not config.inference_mode]
        if not masks:
            raise ValueError(
                "ExactResumeCallback found no mask adapter that trains: wrap the model with "
                "get_peft_model(model, MaskConfig(…)) before it goes to the Trainer, or leave the callback out."
            )
        self._before = [(config, config.save_scores) for config in masks]
        for config in masks:
            config.save_scores = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set ``save_scores`` back."""
        self._restore()

    def _restore(self) -> None:
        for config, save_scores in self._before:
            config.save_scores = save_scores
        self._before = []
