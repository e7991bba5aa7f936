# SPDX-License-Identifier: Apache-2.0
"""Masked norm layers: an ablation (the paper's Table 5b shows that they ruin a model), by ``mask_norms=True`` only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .adapters import AdapterLayer
from .architectures import exact_targets, matching_names
from .batch_norm import STATISTICS, BatchNorm, has_statistics
from .checkpoint import StoredLayer
from .config import MaskConfig
from .forms import Substituted
from .kinds import is_norm, iter_layers
from .layer import MaskLayer
from .slots import Slot
from .substitution import call_with

__all__ = ["MaskedBatchNorm", "norm_form_of", "with_norms"]


class MaskedBatchNorm(BatchNorm, Substituted):
    """A BatchNorm whose scale γ is masked, and its shift by option; its statistics follow the BatchNorm policy."""

    slots = (Slot("", "weight"), Slot("bias_", "bias", is_bias=True))

    def __init__(self, base_layer: nn.Module) -> None:
        """Wrap `base_layer`, and hold it in eval mode."""
        super().__init__(base_layer)
        self.other_param_names = (*(slot.mask_name for slot in self.present_slots), *self.other_param_names)

    def update_layer(self, adapter_name: str, config: MaskConfig, key: str) -> None:
        """Add an adapter with its mask; its statistics come with those of every other BatchNorm."""
        AdapterLayer.update_layer(self, adapter_name, config, key)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """As of every masked layer."""
        AdapterLayer.set_requires_grad(self, adapter_names, requires_grad)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write effective weights and statistics into the base; [`unmerge`] puts the base's back."""
        together = self.statistics_to_merge(safe_merge, adapter_names)
        MaskLayer.merge(self, safe_merge, adapter_names)
        self.merge_statistics(together)

    def unmerge(self) -> None:
        """Restore the base's weights and statistics, bit for bit."""
        if not self.merged:
            MaskLayer.unmerge(self)  # which says so
            return
        self._restore()
        BatchNorm.unmerge(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As of every masked layer."""
        return MaskLayer.forward(self, *args, **kwargs)

    def of_base(self, name: str) -> Any:
        """Masked tensors, statistics, and whatever else the base layer has."""
        return BatchNorm.of_base(self, name) if name in STATISTICS else MaskLayer.of_base(self, name)

    def masked_forward(self, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """(batch, channels, …) -> the same, under the masks and the statistics of the named adapters."""
        return self._normalised(names, self.effective_tensors(names), *args)

    def run(self, tensors: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        """See [`masked_forward`]; `tensors` are the active adapters'."""
        return self._normalised(self.active_here(), tensors, *args)

    def _normalised(self, names: Sequence[str], tensors: Sequence[Tensor], x: Tensor) -> Tensor:
        values = dict(zip((slot.path for slot in self.present_slots), tensors, strict=True))
        if statistics := self.statistics_for(names, x):
            values = {path: tensor.to(statistics["running_mean"].dtype) for path, tensor in values.items()}
            values |= statistics
        result: Tensor = call_with(self.get_base_layer(), values, x)
        return result

    def to_checkpoint(self, adapter_name: str, prefix: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bits and statistics; see [`AdapterLayer.to_checkpoint`]."""
        bits = StoredLayer.to_checkpoint(self, adapter_name, prefix, state_dict)
        return {**bits, **BatchNorm.to_checkpoint(self, adapter_name, prefix, state_dict)}

    def from_checkpoint(self, adapter_name: str, prefix: str, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bits and statistics, checked; see [`AdapterLayer.from_checkpoint`]."""
        bits = StoredLayer.from_checkpoint(self, adapter_name, prefix, entries)
        return {**bits, **BatchNorm.from_checkpoint(self, adapter_name, prefix, entries)}

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        AdapterLayer._move_adapter_to_device_of_base_layer(self, adapter_name, device)
        BatchNorm._move_adapter_to_device_of_base_layer(self, adapter_name, device)


def norm_form_of(module: nn.Module) -> type[MaskLayer] | None:
    """The masked form of a norm layer with a scale of its own; None for anything else."""
    if not is_norm(module) or module._parameters.get("weight") is None:
        return None
    return MaskedBatchNorm if has_statistics(module) else Substituted


def with_norms(model: nn.Module, targets: str | Sequence[str] | set[str]) -> str | list[str]:
    """The targets and every norm layer of the model that has a scale, as exact names.

    Raises:
        ValueError: If an adapter is on a BatchNorm already that does not mask it.
    """
    for name, module in model.named_modules():
        if type(module) is BatchNorm:
            raise ValueError(
                f"mask_norms=True: another adapter is on the model and does not mask {name!r}. Add this adapter to "
                "the bare model first."
            )
    norms = [name for name, layer in iter_layers(model) if norm_form_of(layer) is not None]
    return exact_targets(model, list(dict.fromkeys([*matching_names(model, targets), *norms])))
