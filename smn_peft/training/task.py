# SPDX-License-Identifier: Apache-2.0
"""`TrainingTask`: model and objective as one module, so that one wrapper (DDP, autocast) sees both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..backbones import pooled_features
from ..objectives import Objective
from ..tuner import MaskConfig
from ..tuner.batch_norm import has_statistics


class TrainingTask(nn.Module):
    """What the loop trains: a batch goes in, ``{"loss": …}`` comes out.

    Attributes:
        model: A vision model: under an adapter, or bare for the baselines.
        objective: Turns the model's features or logits into a loss.
        adapt_statistics: Whether the BatchNorm statistics of a bare model adapt though none of its weights train.
        base: Fingerprint of the frozen base, by which a resumed run knows it; None if not computed.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, *, adapt_statistics: bool = False, base: str | None = None
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.objective: Any = objective
        self.adapt_statistics, self.base = adapt_statistics, base
        self._run = self._outputs

    def train(self, mode: bool = True) -> TrainingTask:
        """Set train mode, but keep what has no trainable weight in eval mode, or its BatchNorm statistics would move.

        That is a frozen backbone and, under an adapter other than a mask, every frozen BatchNorm. A mask adapter has
        a policy of its own.
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

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Loss of a batch and scalars to log."""
        return self.objective(self._run, batch)

    @torch.no_grad()
    def logits_of(self, features: Tensor) -> Tensor:
        """Pooled features (n, dim) -> logits (n, classes), both fp32 on the CPU; needs an objective with labels."""
        device = next(self.model.parameters()).device
        if self.objective.consumes == "logits":
            base: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
            head = base.forward_head
        else:
            head = self.objective.logits
        return torch.cat([head(part.to(device)).float().cpu() for part in features.split(4096)])

    def before_step(self, step: int, progress: float) -> None:
        """Call the objective's hook, and set the density of a progressive mask for this fraction of the run."""
        self.objective.before_step(step)
        self.set_progress(progress)

    def set_progress(self, progress: float) -> None:
        """Set the density of a progressive mask for this fraction of the run."""
        config = self.mask_config
        if config is not None and config.density_schedule is not None:
            self.model.update_density(progress)

    @property
    def mask_config(self) -> MaskConfig | None:
        """Configuration of the active mask adapter, or None."""
        if not isinstance(self.model, PeftModel):
            return None
        config = self.model.active_peft_config
        return config if isinstance(config, MaskConfig) else None

    def density(self) -> float | None:
        """Fraction of the masked weights that are active; None without a mask."""
        return None if self.mask_config is None else self.model.density()

    def trainable(self) -> Iterator[tuple[str, nn.Parameter, bool]]:
        """(name, parameter, whether it is a score or adapted weight rather than head or objective)."""
        masked, adapter = self.mask_config is not None, isinstance(self.model, PeftModel)
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            if masked:
                adapted = "scores" in name and ".smn_" in name
            else:
                adapted = name.startswith("model.") and not name.startswith("model.head.")
                adapted = adapted and not (adapter and ".modules_to_save." in name)
            yield name, parameter, adapted

    def training_state(self) -> dict[str, Tensor]:
        """All that training changes, by name: scores, head, objective, statistics; never the frozen base."""
        adapter = isinstance(self.model, PeftModel)
        parameters = dict(self.named_parameters())
        state = {}
        for name, tensor in self.state_dict(keep_vars=True).items():
            if name in parameters:
                keep = parameters[name].requires_grad or name.startswith("objective.")
            elif name.startswith("model.") and adapter:
                keep = any(part in name for part in (".smn_running_", ".smn_num_batches", ".modules_to_save."))
            else:
                keep = True
            if keep:
                state[name] = tensor
        return state


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Have the model recompute its activations in backward; ValueError if timm and transformers cannot."""
    module: Any
    for module in model.modules():
        if hasattr(module, "set_grad_checkpointing"):  # timm
            module.set_grad_checkpointing(True)
            return
        if getattr(module, "supports_gradient_checkpointing", False):  # transformers
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            return
    raise ValueError(f"{type(model).__name__} has no gradient checkpointing: leave it off, or split by accumulate.")
