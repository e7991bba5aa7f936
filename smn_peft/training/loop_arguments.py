# SPDX-License-Identifier: Apache-2.0
"""`LoopArguments`: everything that the training loop itself is told, each option with its help text."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["LoopArguments", "option"]


def option(default: Any, help: str) -> Any:
    """A dataclass field with its help text; a mutable default is copied for every instance."""
    if isinstance(default, (dict, list, set)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class LoopArguments:
    """How long, how fast and in what precision to train, and what to write on the way.

    The defaults are the paper's recipe for masks (section 4.1): SGD with momentum 0.9, batches of 64, a cosine to 0.
    """

    output_dir: str = option("output", "Folder for checkpoints, metrics.jsonl and the finished adapter.")
    epochs: int = option(150, "Passes over the training images.")
    max_steps: int | None = option(None, "Stop after this many optimizer steps; the schedule is made for them.")
    batch_size: int = option(64, "Images per optimizer step, over all processes and accumulated parts together.")
    accumulate: int = option(1, "Parts that each process computes its share of a batch in, to save memory.")
    lr: float = option(
        50.0, "Learning rate of the scores (with adapt='full' of the weights); sweep it on a log scale."
    )
    head_lr: float = option(0.15, "Learning rate of everything else that trains: head, projection, prototypes.")
    optimizer: Literal["sgd", "adamw"] = option("sgd", "Optimizer; 'adamw' wants lr 0.03 to 0.1 for scores.")
    momentum: float = option(0.9, "Momentum of SGD.")
    weight_decay: float = option(0.0, "Weight decay of the scores (or weights). Scores want none.")
    head_weight_decay: float = option(0.0, "Weight decay of everything else that trains.")
    warmup_epochs: float = option(0.0, "Epochs of linear warm-up before the cosine; it starts at (e+1)/W, not at 0.")
    schedule_every: Literal["step", "epoch"] = option("step", "How often the learning rate moves.")
    mixed_precision: Literal["no", "bf16", "fp16"] = option("no", "Autocast of the forward; scores stay as they are.")
    score_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "Dtype of scores and their momentum; bfloat16 takes half the memory, by stochastic rounding."
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in backward, to save memory.")
    channels_last: bool = option(False, "Keep images and convolution weights with channels last (GPU).")
    compile: bool = option(False, "Run the model's forward through torch.compile.")
    sync_batch_norm: bool = option(True, "With several processes, normalise by the whole batch, as one process would.")
    cpu: bool = option(False, "Train on the CPU even where there is a GPU.")
    seed: int = option(0, "Seed of weights, order and augmentation.")
    log_every: int = option(10, "Optimizer steps between two lines of metrics.jsonl.")
    checkpoint_every: int | None = option(None, "Optimizer steps between checkpoints; None: once per epoch.")
    keep_checkpoints: int = option(1, "Newest checkpoints to keep; 0 writes none.")
    evaluate_every: int | None = option(None, "Epochs between two online evaluations; None: only before and after.")
    log_with: str | None = option(None, "An accelerate tracker beside metrics.jsonl, such as 'tensorboard', 'wandb'.")
    resume: bool = option(False, "Go on from the newest checkpoint in output_dir, exactly where it was.")

    def __post_init__(self) -> None:
        """Check the numbers before anything is loaded."""
        for name in ("epochs", "batch_size", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        for name in ("lr", "head_lr", "momentum", "weight_decay", "head_weight_decay", "warmup_epochs"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number of at least 0; got {getattr(self, name)}.")
        if self.momentum >= 1:
            raise ValueError(f"momentum must lie in [0, 1), or nothing is ever forgotten; got {self.momentum}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2**32); got {self.seed}.")
        for name in ("max_steps", "checkpoint_every", "evaluate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or None; got {value}.")
        for name, allowed in (
            ("optimizer", ("sgd", "adamw")),
            ("schedule_every", ("step", "epoch")),
            ("mixed_precision", ("no", "bf16", "fp16")),
            ("score_dtype", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}.")


# What may differ between a run and its resumption: nothing of it moves a weight. What the last two name is compared by
# its content, so that folders can be moved.
HARMLESS = frozenset(
    "output_dir resume log_every checkpoint_every keep_checkpoints log_with evaluate_every num_workers cache_images "
    "eval_split eval_limit eval_probe knn_k knn_limit init_from indices_file".split()
)
