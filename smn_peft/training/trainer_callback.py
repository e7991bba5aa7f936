# SPDX-License-Identifier: Apache-2.0
"""`ExactResumeCallback`: transformers' `Trainer` resumes a mask where it was interrupted, not from its bits."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..tuner import MaskConfig

__all__ = ["ExactResumeCallback"]


class ExactResumeCallback(TrainerCallback):
    """Keeps the scores in the checkpoints of transformers' `Trainer`, and out of what is saved after training.

    The `Trainer` writes a checkpoint with `save_pretrained`, which stores one bit per weight, and resumes from it with
    `load_adapter(is_trainable=True)`, which then has to invent the scores: the run goes on from the right mask along
    another path. With this callback ``save_scores`` is on from the beginning of training to its end, so that the
    checkpoints are 32 times larger and a run that is interrupted ends in the same mask. Afterwards the option is what
    it was, so `trainer.save_model()` exports the bits.

    ```python
    trainer = Trainer(model, arguments, callbacks=[ExactResumeCallback()], …)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model("adapter")
    ```
    """

    def __init__(self) -> None:
        """Remember nothing yet."""
        self._before: list[tuple[MaskConfig, bool]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Switch ``save_scores`` on for every mask adapter of the model that trains.

        Raises:
            ValueError: If the model has none.
        """
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
