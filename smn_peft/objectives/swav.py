# SPDX-License-Identifier: Apache-2.0
"""SwAV: learn without labels by predicting, from one view of an image, the prototypes assigned to another.

Caron et al. 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments". Several processes
compute what one process computes on the joined batch: the Sinkhorn sums run over all of them, and so does the queue.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..functional.distributed import (
    all_reduce,
    gather_rows,
    process_count,
    process_index,
    sinkhorn,
)
from .base import Batch, Model, Objective, register_objective
from .batch import crops_of, features_of_crops
from .heads import ProjectionHead, Prototypes
from .swav_options import SwAVOptions

__all__ = ["SwAV", "swapped_prediction_loss"]


def swapped_prediction_loss(scores: Tensor, codes: Tensor, temperature: float) -> Tensor:
    """SwAV's loss (Eq. 2, over several crops): ``−Σ_k q_s^k · log softmax_k(z_tᵀc / τ)``.

    Args:
        scores: Similarities ``z_tᵀc`` of every view, (views, batch, prototypes), fp32.
        codes: Codes q of the global crops, which are the first views, (global crops, batch, prototypes).
        temperature: τ.

    Returns:
        The mean over images, global crops s and all other views t, 0-dim.
    """
    log_predictions = (scores / temperature).log_softmax(2)
    others = log_predictions.sum(0) - log_predictions[: len(codes)]
    return -(codes * others).sum(2).mean() / (len(scores) - 1)


@register_objective("swav")
class SwAV(Objective):
    """SwAV on features: projection head, prototypes, multi-crop swapped prediction and a queue of embeddings.

    The queue starts to fill at the step that the options name and counts once it is full. The gradients of the
    prototypes are dropped for the first steps, after they are reduced, so that every process does the same.
    """

    views = "crops"
    needs_labels = False
    consumes = "features"
    run_state = ("queue", "queue_filled")
    Options = SwAVOptions
    queue: Tensor
    queue_filled: Tensor

    def __init__(self, feature_dim: int, num_classes: int | None, options: SwAVOptions) -> None:
        """Make head, prototypes and an empty queue; see [`Objective`]."""
        super().__init__(feature_dim, num_classes, options)
        self.head = ProjectionHead(options.projection, feature_dim, options.hidden_dim, options.output_dim)
        self.prototypes = Prototypes(options.output_dim, options.prototypes)
        # Oldest row first. Every process holds all rows.
        size = (options.global_crops, options.queue_length, options.output_dim)
        self.register_buffer("queue", torch.zeros(size))
        self.register_buffer("queue_filled", torch.zeros((), dtype=torch.int64))
        # Known once it is, so that later steps do not wait for the device.
        self._queue_full = False
        self._queue_from = options.queue_from_step
        self._step = self._half = 0

    def begin(self, total_steps: int) -> None:
        """Turn `queue_from` into a step; see [`Objective.begin`]."""
        self._queue_full, self._half = False, total_steps // 2
        if self.options.queue_from_step is None:
            self._queue_from = round(self.options.queue_from * total_steps)

    def before_step(self, step: int) -> None:
        """Bring the prototypes back to length 1; see [`Objective.before_step`].

        Raises:
            RuntimeError: If the step at which the queue starts is not known.
        """
        if self.options.queue_length and self._queue_from is None:
            raise RuntimeError(
                "SwAV's queue starts at a fraction of the run (queue_from), whose length is not known: call "
                "begin(total_steps) before training, or set queue_from_step."
            )
        self._step = step
        # Frozen ones are left alone: normalising again could move a last bit.
        if step > self.options.freeze_prototypes_steps:
            self.prototypes.normalise()

    def after_backward(self, step: int) -> None:
        """Drop the prototypes' gradient while they are frozen; see [`Objective.after_backward`].

        None and not zero, so that neither weight decay nor momentum moves them.
        """
        if step < self.options.freeze_prototypes_steps:
            self.prototypes.weight.grad = None

    def forward(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch of crops; see [`Objective.forward`].

        In train mode the global crops' embeddings go into the queue. With gradient accumulation every forward has
        codes and a queue of its own: fewer, larger batches are another run.

        Returns:
            ``"loss"``; ``"codes_entropy"``, the mean entropy of a code in nats, ln K where codes say nothing; and
            ``"prototypes_used"``, how many prototypes are the first choice of some global crop of the joined batch.

        Raises:
            ValueError: If crops are missing, the features have another dimension, or batch and queue have fewer rows
                than there are prototypes.
        """
        options: SwAVOptions = self.options
        crops = crops_of(batch, self.name, options.global_crops)
        self._check_rows(len(crops[0]))
        embeddings = self.head(features_of_crops(model, crops, self.feature_dim, self.name))
        with torch.autocast(embeddings.device.type, enabled=False):
            scores: Tensor = self.prototypes(embeddings).unflatten(0, (len(crops), -1))
            codes = self._codes(scores.detach()[: options.global_crops])
            loss = swapped_prediction_loss(scores, codes, options.temperature)
        if self.training and options.queue_length and self._step >= (self._queue_from or 0):
            self._enqueue(embeddings.detach().unflatten(0, (len(crops), -1))[: options.global_crops])
        return {"loss": loss, **_describe(codes)}

    @property
    def grace_steps(self) -> int:
        """Until the prototypes move, of a run that ends before that the half; see [`Objective.grace_steps`]."""
        frozen: int = self.options.freeze_prototypes_steps
        return min(frozen, self._half)

    def collapsed(self, logs: Mapping[str, float]) -> str | None:
        """Whether every image has the same, uniform code and the loss stands at ln K; see [`Objective.collapsed`]."""
        uniform = math.log(self.options.prototypes)
        if logs["codes_entropy"] < 0.99 * uniform or logs["loss"] < 0.99 * uniform:
            return None
        return (
            f"SwAV has collapsed: loss {logs['loss']:.3f} and the codes' entropy {logs['codes_entropy']:.3f} stand at "
            f"ln K = {uniform:.3f} for K = {self.options.prototypes}, so all images look the same to the prototypes. "
            "Try projection='mlp', fewer prototypes (at most batch + queue), a smaller epsilon, or another learning "
            "rate of the scores or the head."
        )

    def _check_rows(self, batch_size: int) -> None:
        options: SwAVOptions = self.options
        rows = batch_size * process_count() + options.queue_length
        if rows < options.prototypes and not options.allow_few_rows:
            raise ValueError(
                f"{options.prototypes} prototypes cannot each get an image: the batch has "
                f"{batch_size * process_count()} images over all processes and the queue {options.queue_length} rows. "
                f"Set prototypes to {rows} or less, enlarge the batch or queue_length, or set allow_few_rows=True."
            )

    @torch.no_grad()
    def _codes(self, scores: Tensor) -> Tensor:
        """(global crops, batch, K) similarities -> codes; the queue's rows join the Sinkhorn and are dropped."""
        options: SwAVOptions = self.options
        rows = scores
        if self.training and options.queue_length and self._is_queue_full():
            # Each process brings its share, so that the joined rows hold the queue once.
            share = self.queue.tensor_split(process_count(), dim=1)[process_index()]
            rows = torch.cat([self.prototypes(share), scores], dim=1)
        codes = [sinkhorn(r, options.epsilon, options.sinkhorn_iterations) for r in rows]
        return torch.stack(codes)[:, -scores.shape[1] :]

    def _is_queue_full(self) -> bool:
        if not self._queue_full:
            self._queue_full = int(self.queue_filled) == self.queue.shape[1]
        return self._queue_full

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._queue_full = False

    @torch.no_grad()
    def _enqueue(self, embeddings: Tensor) -> None:
        """Put the joined batch's (global crops, batch, dim) embeddings at the end of the queue."""
        length = self.queue.shape[1]
        new = gather_rows(embeddings, dim=1)[:, -length:]
        self.queue.copy_(torch.cat([self.queue[:, new.shape[1] :], new], dim=1))
        self.queue_filled.add_(new.shape[1]).clamp_(max=length)


@torch.no_grad()
def _describe(codes: Tensor) -> dict[str, Tensor]:
    """Scalars that show a collapse, from codes (global crops, batch, K)."""
    used = torch.zeros(codes.shape[2], device=codes.device)
    used[codes.argmax(2).flatten()] = 1
    return {
        "codes_entropy": torch.special.entr(codes).sum(2).mean(),
        "prototypes_used": all_reduce(used, "max").sum(),
    }
