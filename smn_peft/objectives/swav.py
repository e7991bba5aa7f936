# SPDX-License-Identifier: Apache-2.0
"""SwAV: learn without labels by predicting, from one view of an image, the prototypes assigned to another.

Caron et al. 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments". N processes compute
what one process computes on the joined batch: Sinkhorn's sums and the queue run over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._options import check_options, option
from ..functional.distributed import all_reduce, gather_rows, process_count, process_index, sinkhorn
from .base import Batch, Model, Objective, register_objective


@dataclass(frozen=True)
class SwAVOptions:
    """Options of [`SwAV`]: the paper's, except that its linear projection stays at loss ln K in short runs."""

    projection: Literal["linear", "mlp"] = option(
        "mlp", "Projection head: 'linear' (the paper's authors) or 'mlp' (SwAV's own: Linear-BN-ReLU-Linear)."
    )
    hidden_dim: int = option(2048, "Width of the hidden layer of the 'mlp' projection.", least=1)
    output_dim: int = option(128, "Dimension of the embeddings that are compared with the prototypes.", least=1)
    prototypes: int = option(500, "Number of prototypes, at most batch + queue.", least=2)
    temperature: float = option(0.1, "Temperature τ of the predictions.", above=0)
    epsilon: float = option(0.05, "Sinkhorn's ε; the smaller, the harder the codes.", above=0)
    sinkhorn_iterations: int = option(3, "Number of Sinkhorn iterations.", least=1)
    queue_length: int = option(
        512, "Rows of earlier batches that join the Sinkhorn, over all processes; 0 for none.", least=0
    )
    queue_from: float = option(0.2, "Part of the run before the queue fills; it counts when full.", least=0, most=1)
    queue_from_step: int | None = option(None, "Step from which the queue fills, in place of `queue_from`.", least=0)
    freeze_prototypes_steps: int = option(5005, "Number of first steps in which the prototypes do not move.", least=0)
    global_crops: int = option(2, "Number of first crops of a batch that codes are computed from.", least=1)
    allow_few_rows: bool = option(False, "Train although batch and queue have fewer rows than there are prototypes.")

    def __post_init__(self) -> None:
        check_options(self)


def swapped_prediction_loss(scores: Tensor, codes: Tensor, temperature: float) -> Tensor:
    """SwAV's loss (Eq. 2): the mean of ``−Σ_k q_s^k · log softmax_k(z_tᵀc / τ)``, 0-dim.

    It is over images, global crops s and all other views t. `scores` are similarities ``z_tᵀc``, fp32 (views, batch,
    prototypes); `codes` are q of the global crops, which are the first views, (global crops, batch, prototypes).
    """
    log_predictions = (scores / temperature).log_softmax(2)
    others = log_predictions.sum(0) - log_predictions[: len(codes)]
    return -(codes * others).sum(2).mean() / (len(scores) - 1)


class ProjectionHead(nn.Module):
    """Project features (batch, feature_dim) to embeddings (batch, output_dim) of length 1, fp32."""

    def __init__(self, kind: str, feature_dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        self.projection: nn.Module = nn.Linear(feature_dim, output_dim if kind == "linear" else hidden_dim)
        if kind == "mlp":
            rest = nn.BatchNorm1d(hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, output_dim)
            self.projection = nn.Sequential(self.projection, *rest)

    def forward(self, features: Tensor) -> Tensor:
        """Project and normalise."""
        projected: Tensor = self.projection(features.float())
        return F.normalize(projected.float(), dim=1)  # fp32: bf16 lengths are off by 1 %


class Prototypes(nn.Module):
    """`count` unit vectors of dimension `dim` that embeddings are compared with; a linear layer without bias."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(count, dim), dim=1))

    def forward(self, embeddings: Tensor) -> Tensor:
        """(batch, dim) -> cosine similarities (batch, K), fp32 also under autocast."""
        with torch.autocast(embeddings.device.type, enabled=False):
            return F.linear(embeddings.float(), self.weight)


@register_objective("swav")
class SwAV(Objective):
    """Projection head, prototypes, multi-crop swapped prediction and a queue of embeddings on top of features.

    The queue fills from the step that the options name and counts once it is full. In the first steps the gradients
    of the prototypes are dropped after they are reduced, so that every process does the same. See [`Objective`] for
    the arguments.
    """

    views = "crops"
    needs_labels = False
    consumes = "features"
    run_state = ("queue", "queue_filled")
    Options = SwAVOptions
    queue: Tensor
    queue_filled: Tensor

    def __init__(self, feature_dim: int, num_classes: int | None, options: SwAVOptions) -> None:
        super().__init__(feature_dim, num_classes, options)
        self.head = ProjectionHead(options.projection, feature_dim, options.hidden_dim, options.output_dim)
        self.prototypes = Prototypes(options.output_dim, options.prototypes)
        # Oldest row first; every process holds all rows.
        self.register_buffer("queue", torch.zeros(options.global_crops, options.queue_length, options.output_dim))
        self.register_buffer("queue_filled", torch.zeros((), dtype=torch.int64))
        self._queue_from = options.queue_from_step
        self._queue_full, self._step, self._half = False, 0, 0

    def begin(self, total_steps: int) -> None:
        """Convert `queue_from` to a step; see [`Objective.begin`]."""
        self._queue_full, self._half = False, total_steps // 2
        if self.options.queue_from_step is None:
            self._queue_from = round(self.options.queue_from * total_steps)

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Normalise the prototypes; see [`Objective.before_step`]."""
        if self.options.queue_length and self._queue_from is None:
            unknown = "SwAV's queue starts at a fraction of the run (queue_from), whose length is not known"
            raise RuntimeError(f"{unknown}: call begin(total_steps) before training, or set queue_from_step.")
        self._step = step
        # Frozen ones are left alone: normalising again could move a last bit.
        if step > self.options.freeze_prototypes_steps:
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

    def after_backward(self, step: int) -> None:
        """Drop the prototypes' gradient while they are frozen; see [`Objective.after_backward`]."""
        if step < self.options.freeze_prototypes_steps:
            self.prototypes.weight.grad = None  # not zero, or weight decay and momentum would move them

    def forward(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss of a batch of crops; in train mode, add the global crops' embeddings to the queue.

        With gradient accumulation every forward has its own codes, so N small batches are not one large batch.

        Returns:
            ``"loss"``; ``"codes_entropy"``, the mean entropy of a code in nats, ln K for uniform codes; and
            ``"prototypes_used"``, how many are the argmax of some global crop of the joined batch.
        """
        options: SwAVOptions = self.options
        crops = self.crops(batch, options.global_crops)
        images = len(crops[0]) * process_count()
        rows = images + options.queue_length
        if rows < options.prototypes and not options.allow_few_rows:
            found = f"the batch has {images} images over all processes and the queue {options.queue_length} rows"
            fix = f"Set prototypes to {rows} or less, enlarge the batch or queue_length, or set allow_few_rows=True."
            raise ValueError(f"{options.prototypes} prototypes cannot each get an image: {found}. {fix}")
        embeddings = self.head(self.crop_features(model, crops))
        with torch.autocast(embeddings.device.type, enabled=False):
            scores: Tensor = self.prototypes(embeddings).unflatten(0, (len(crops), -1))
            codes = self._codes(scores.detach()[: options.global_crops])
            loss = swapped_prediction_loss(scores, codes, options.temperature)
        if self.training and options.queue_length and self._step >= (self._queue_from or 0):
            self._enqueue(embeddings.detach().unflatten(0, (len(crops), -1))[: options.global_crops])
        used = torch.zeros(options.prototypes, device=codes.device)
        used[codes.argmax(2).flatten()] = 1
        entropy = torch.special.entr(codes).sum(2).mean()
        return {"loss": loss, "codes_entropy": entropy, "prototypes_used": all_reduce(used, "max").sum()}

    @property
    def grace_steps(self) -> int:
        """Steps until the prototypes move, at most half of the run; see [`Objective.grace_steps`]."""
        return min(int(self.options.freeze_prototypes_steps), self._half)

    def collapsed(self, logs: Mapping[str, float]) -> str | None:
        """Describe a collapse to uniform codes, with the loss at ln K; see [`Objective.collapsed`]."""
        uniform = math.log(self.options.prototypes)
        if logs["codes_entropy"] < 0.99 * uniform or logs["loss"] < 0.99 * uniform:
            return None
        found = f"loss {logs['loss']:.3f} and the codes' entropy {logs['codes_entropy']:.3f} stand at ln K"
        fix = "Try projection='mlp', fewer prototypes, a smaller epsilon, or another learning rate of scores or head."
        return f"SwAV has collapsed: {found} = {uniform:.3f} for K = {self.options.prototypes}. {fix}"

    @torch.no_grad()
    def _codes(self, scores: Tensor) -> Tensor:
        """(global crops, batch, K) similarities -> codes; the queue's rows join the Sinkhorn and are dropped."""
        options: SwAVOptions = self.options
        rows = scores
        if self.training and options.queue_length:  # to look is to wait for the device
            self._queue_full = self._queue_full or int(self.queue_filled) == options.queue_length
        if self.training and self._queue_full:
            # Each process brings its share, so that the joined rows hold the queue once.
            share = self.queue.tensor_split(process_count(), dim=1)[process_index()]
            rows = torch.cat([self.prototypes(share), scores], dim=1)
        codes = [sinkhorn(r, options.epsilon, options.sinkhorn_iterations) for r in rows]
        return torch.stack(codes)[:, -scores.shape[1] :]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._queue_full = False

    @torch.no_grad()
    def _enqueue(self, embeddings: Tensor) -> None:
        """Append the joined batch's (global crops, batch, dim) embeddings to the queue."""
        length = self.queue.shape[1]
        new = gather_rows(embeddings, dim=1)[:, -length:]
        self.queue.copy_(torch.cat([self.queue[:, new.shape[1] :], new], dim=1))
        self.queue_filled.add_(new.shape[1]).clamp_(max=length)
