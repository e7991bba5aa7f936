# SPDX-License-Identifier: Apache-2.0
"""Make the BatchNorms of a model normalise by the joined batch of all processes, on the CPU as on a GPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..functional.distributed import joined_batch_norm, process_count

__all__ = ["SynchronisedBatchNorm", "synchronise_batch_norm"]


class SynchronisedBatchNorm(_BatchNorm):
    """A BatchNorm over the joined batch on any device, with the activation of timm's BatchNorms where there is one.

    No `nn.SyncBatchNorm`, which refuses the CPU, and which DDP refuses there.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"BatchNorm takes (batch, channels, …), got {tuple(input.shape)}.")

    def forward(self, input: Tensor) -> Tensor:
        """(batch, channels, …) -> the same, normalised by the joined batch in train mode."""
        synchronise = self.training and process_count() > 1
        x = self._normalise(input) if synchronise else super().forward(input)
        for name in ("drop", "act"):
            after = self._modules.get(name)
            x = x if after is None else after(x)
        return x

    def _normalise(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        momentum = self.momentum or 0.0
        mean, var = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        return joined_batch_norm(x, mean, var, self.weight, self.bias, momentum, self.eps)


def synchronise_batch_norm(module: nn.Module) -> nn.Module:
    """Make every BatchNorm in a module normalise by the joined batch when it is in train mode.

    Each BatchNorm stays the object that it is, with its parameters, buffers, hooks and mode; only its class changes,
    so references to it hold and the state dict does not change. What lies on the CPU gets
    [`SynchronisedBatchNorm`], what lies on a GPU torch's own with timm's activation, which is faster there. In eval
    mode, and so under ``MaskConfig(batch_norm="frozen")``, and with one process nothing changes.

    Args:
        module: Any module on its device: a plain model, a PEFT model, an objective.

    Returns:
        `module`.

    Raises:
        TypeError: If there is a BatchNorm of a class that this cannot stand in for.
    """
    from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct

    known = {kind.forward for kind in (_BatchNorm, nn.SyncBatchNorm, BatchNormAct2d, SyncBatchNormAct)}
    found = ((name, norm) for name, norm in module.named_modules() if isinstance(norm, _BatchNorm))
    norms: dict[str, Any] = {name: norm for name, norm in found if not isinstance(norm, SynchronisedBatchNorm)}
    for name, norm in norms.items():
        if type(norm).forward not in known or nn.parameter.is_lazy(norm.weight):
            raise TypeError(
                f"{name or 'The module'} is a {type(norm).__name__}, which cannot be synchronised over processes: "
                "use nn.BatchNorm (a lazy one after its first forward), or keep the statistics fixed with "
                "batch_norm='frozen' and switch the synchronisation off."
            )
    for norm in norms.values():
        tensors = [tensor for tensor in (norm.weight, norm.running_mean) if tensor is not None]
        on_gpu = bool(tensors) and tensors[0].is_cuda
        # timm's has no activation of its own: it runs what it finds.
        norm.__class__ = SyncBatchNormAct if on_gpu else SynchronisedBatchNorm
        norm.process_group = getattr(norm, "process_group", None)
    return module
