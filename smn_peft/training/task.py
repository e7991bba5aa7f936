# SPDX-License-Identifier: Apache-2.0
"""`TrainingTask`: model and objective as one module, so that one wrapper (DDP, autocast) sees both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..backbones import pooled_features
from ..functional.distributed import read_flags
from ..objectives import Objective
from ..tuner import MaskConfig, round_extras
from ..tuner.batch_norm import has_statistics

__all__ = ["TrainingTask"]

_ROWS = 4096


class TrainingTask(nn.Module):
    """What the loop trains: a batch goes in, ``{"loss": …}`` comes out.

    Attributes:
        model: A vision model: under a mask adapter, or bare for full fine-tuning.
        objective: Turns the model's features or logits into a loss.
        adapt_statistics: Whether the BatchNorm statistics of a bare model move though none of its weights train.
        base: Fingerprint of the frozen base, by which a run knows it again; None if nobody took it.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, *, adapt_statistics: bool = False, base: str | None = None
    ) -> None:
        """Take both as they are."""
        super().__init__()
        self.model: Any = model
        self.objective: Any = objective
        self.adapt_statistics, self.base = adapt_statistics, base
        self._run = self._outputs

    def train(self, mode: bool = True) -> TrainingTask:
        """Train mode; what trains nothing stays in eval mode, or its BatchNorm statistics would move.

        That is a backbone of which no weight trains, and under an adapter that is no mask every frozen BatchNorm:
        nothing would save its statistics. A mask adapter has a policy of its own.
        """
        super().train(mode)
        if self.adapt_statistics:
            return self
        parts: list[nn.Module] = list(self.model.children())
        if isinstance(self.model, PeftModel) and self.mask_config is None:
            parts += [module for module in self.model.modules() if has_statistics(module)]
        for part in parts:
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the model's forward; the objective, which gathers over processes, stays as it is."""
        self._run = torch.compile(self._outputs, *args, **kwargs)

    def _outputs(self, pixel_values: Tensor) -> Tensor:
        if self.objective.consumes == "logits":
            output = self.model(pixel_values)
            logits: Tensor = output if isinstance(output, Tensor) else output.logits
            return logits
        return pooled_features(self.model, pixel_values)

    @torch.no_grad()
    def logits_of(self, features: Tensor) -> Tensor:
        """Logits of pooled features, for the evaluation of a task that learns from labels.

        Args:
            features: fp32 (n, dim) on the CPU, such as `extract_features` gives of this task's model.

        Returns:
            fp32 (n, classes) on the CPU.
        """
        device = next(self.model.parameters()).device
        if self.objective.consumes == "logits":
            base: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
            head = base.forward_head
        else:
            head = self.objective.logits
        return torch.cat([head(part.to(device)).float().cpu() for part in features.split(_ROWS)])

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Loss and what to log of one batch."""
        return self.objective(self._run, batch)

    def before_step(self, step: int, progress: float) -> None:
        """What happens before the forward of a step: the objective's hook, and the density of a progressive mask."""
        self.objective.before_step(step)
        self.move_density(progress)

    def move_density(self, progress: float) -> None:
        """Give a progressive mask the density of this fraction of the run; any other is left alone."""
        config = self.mask_config
        if config is not None and config.density_schedule is not None:
            self.model.update_density(progress)

    @property
    def mask_config(self) -> MaskConfig | None:
        """Configuration of the mask adapter that trains, or None."""
        if not isinstance(self.model, PeftModel):
            return None
        config = self.model.active_peft_config
        return config if isinstance(config, MaskConfig) else None

    def density(self) -> float | None:
        """Fraction of the masked weights that are active; None without a mask."""
        return None if self.mask_config is None else self.model.density()

    def empty_masks(self) -> list[str]:
        """Names of the weights whose mask has nothing left."""
        if self.mask_config is None:
            return []
        masks = self.model.masks()
        some_left = read_flags([mask.any() for mask in masks.values()])
        return [name for name, some in zip(masks, some_left, strict=True) if not some]

    def trainable(self) -> Iterator[tuple[str, nn.Parameter, bool]]:
        """(name, parameter, whether it is adapted weight or score rather than head or objective)."""
        masked, adapter = self.mask_config is not None, isinstance(self.model, PeftModel)
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                kept = adapter and ".modules_to_save." in name
                adapted = _is_scores(name) if masked else _is_body(name) and not kept
                yield name, parameter, adapted

    def round_extras(self) -> None:
        """Round head and statistics as saving will, so that what is evaluated is what is saved."""
        if self.mask_config is not None:
            round_extras(self.model)

    def training_state(self) -> dict[str, Tensor]:
        """All that training moves, by name: scores, head, objective, statistics; never the frozen base."""
        frozen = isinstance(self.model, PeftModel)
        parameters = dict(self.named_parameters())
        state = {}
        for name, tensor in self.state_dict(keep_vars=True).items():
            if name in parameters:
                keep = parameters[name].requires_grad or name.startswith("objective.")
            elif name.startswith("model.") and frozen:
                keep = any(part in name for part in (".smn_running_", ".smn_num_batches", ".modules_to_save."))
            else:
                keep = True
            if keep:
                state[name] = tensor
        return state


def _is_scores(name: str) -> bool:
    return "scores" in name and ".smn_" in name


def _is_body(name: str) -> bool:
    """Whether a parameter of a bare model belongs to the backbone rather than to its head or the objective."""
    parts = name.split(".")
    return parts[0] == "model" and parts[1] != "head"
