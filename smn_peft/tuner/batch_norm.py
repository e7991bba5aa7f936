# SPDX-License-Identifier: Apache-2.0
"""The BatchNorm policy: a masked model's running statistics are the base's, or each adapter has its own.

A frozen BatchNorm still updates its running statistics in train mode: without this wrapper an adapter would reload as
another model. ``batch_norm="frozen"`` holds every BatchNorm in eval mode; ``"adapt"`` (the paper's) normalises by the
batch while training and keeps the running statistics per adapter, saved with it and switched with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..functional.masking import MaskSpec
from .config import MaskConfig
from .wrapper import AdapterInfo, AdapterLayer, ResidentBuffers, call_with

__all__ = ["BatchNorm", "add_batch_norms", "bare_norms", "has_statistics"]

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def has_statistics(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm (of torch, timm's with activation, synchronised …) with running statistics."""
    return isinstance(module, _BatchNorm) and module.running_mean is not None


class BatchNorm(AdapterLayer):
    """A frozen BatchNorm whose running statistics may differ between adapters."""

    def __init__(self, base_layer: nn.Module) -> None:
        """Wrap `base_layer`, and hold it in eval mode."""
        super().__init__(base_layer)
        for name in STATISTICS:
            setattr(self, f"smn_{name}", ResidentBuffers())
        self.other_param_names = (*(f"smn_{name}" for name in STATISTICS), "smn_info")
        self._base_statistics: dict[str, Tensor] = {}
        self._set_mode()

    # --- Statistics --------------------------------------------------------------------------------------------------

    def statistics(self, name: str) -> ResidentBuffers:
        """`running_mean`, `running_var` or `num_batches_tracked` by adapter name."""
        return self._modules[f"smn_{name}"]  # type: ignore[return-value]

    def base_statistics(self) -> dict[str, Tensor]:
        """A copy of the base's own statistics by name, whatever is merged into them."""
        return {name: self._base_buffer(name).clone() for name in STATISTICS}

    def statistics_of(self, adapter_name: str) -> dict[str, Tensor]:
        """An adapter's statistics by name; empty if it has none of its own."""
        containers = {name: self.statistics(name) for name in STATISTICS}
        return {name: buffers[adapter_name] for name, buffers in containers.items() if adapter_name in buffers}

    def set_statistics(self, adapter_name: str, statistics: Mapping[str, Tensor]) -> None:
        """Replace what [`statistics_of`] gives."""
        for name in STATISTICS:
            if name in statistics:
                self.statistics(name)[adapter_name] = statistics[name]
            else:
                self.statistics(name).discard(adapter_name)
        self._set_mode()

    def average(self, adapter_name: str, adapters: Sequence[str], weights: Sequence[float]) -> None:
        """Set an adapter's statistics to the weighted mean of others', or of the base's where one has none."""
        if adapter_name not in self.statistics("running_mean"):
            return
        parts = [{**self.base_statistics(), **self.statistics_of(other)} for other in adapters]
        for name in ("running_mean", "running_var"):
            shares = [part[name] * (weight / sum(weights)) for part, weight in zip(parts, weights, strict=True)]
            self.statistics(name)[adapter_name] = torch.stack(shares).sum(0)

    def _base_buffer(self, name: str) -> Tensor:
        return self._base_statistics.get(name, self.get_base_layer().get_buffer(name))

    def _adapting(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self.statistics("running_mean")]

    def _combined(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Statistics of the named adapters that have some; the mean over several."""
        names = self._adapting(names)
        if len(names) <= 1:
            return self.statistics_of(names[0]) if names else {}
        stacks = {name: torch.stack([self.statistics(name)[other] for other in names]) for name in STATISTICS}
        return {name: s.mean(0) if s.is_floating_point() else s.amax(0) for name, s in stacks.items()}

    def of_base(self, name: str) -> Any:
        """An attribute of the base layer; statistics are those that the layer normalises by."""
        if name not in STATISTICS:
            return super().of_base(name)
        self.unmerge_if_disabled()
        statistics = {} if self._disable_adapters or self.merged else self._combined(self.active_adapters)
        return statistics[name] if name in statistics else super().of_base(name)

    # --- Life cycle --------------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, config: MaskConfig, key: str) -> None:
        """Add an adapter; with ``batch_norm="adapt"`` its statistics start from a copy of the base's."""
        self.smn_info[adapter_name] = AdapterInfo(config, MaskSpec(), key, ())
        if config.batch_norm == "adapt":
            self.set_statistics(adapter_name, self.base_statistics())
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _set_mode(self) -> None:
        """Normalise by the batch only in train mode, for the one active adapter that adapts and trains."""
        names = self._adapting(self.active_adapters) if not self.disable_adapters and not self.merged else []
        trainable = [name for name in names if not self.smn_info[name].config.inference_mode]
        if self.training and len(trainable) > 1:
            raise ValueError(
                f"The adapters {trainable} all adapt the BatchNorm statistics and cannot train together: activate "
                "one, or use batch_norm='frozen'."
            )
        self.get_base_layer().train(self.training and len(names) == len(trainable) == 1)

    def train(self, mode: bool = True) -> BatchNorm:
        """Set the mode; the base BatchNorm follows the policy."""
        super().train(mode)
        self._set_mode()
        return self

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters; the statistics switch with them."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._set_mode()

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable; a disabled adapter leaves the base's statistics."""
        super().enable_adapters(enabled)
        self._set_mode()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; nothing of it stays resident."""
        super().delete_adapter(adapter_name)
        self._set_mode()

    # --- Merging -----------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapter's statistics into the base; [`unmerge`] puts the base's back."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.smn_info]
        if not names:
            return
        together = [*self.merged_adapters, *names]
        statistics = self._combined(together)
        if safe_merge and not all(torch.isfinite(tensor).all() for tensor in statistics.values()):
            raise ValueError(f"NaNs detected in the BatchNorm statistics of adapter {names[0]!r}: nothing was merged.")
        for name, tensor in statistics.items():
            base = self.get_base_layer().get_buffer(name)
            self._base_statistics.setdefault(name, base.clone())
            base.copy_(tensor)
        self.merged_adapters = together
        self._set_mode()

    def unmerge(self) -> None:
        """Restore the base's statistics."""
        for name, buffer in self._base_statistics.items():
            self.get_base_layer().get_buffer(name).copy_(buffer)
        self._base_statistics = {}
        self.merged_adapters = []
        self._set_mode()

    def unmerged(self) -> dict[int, Tensor | None]:
        """See [`AdapterLayer.unmerged`]."""
        return {id(self.get_base_layer().get_buffer(name)): own for name, own in self._base_statistics.items()}

    # --- Forward -----------------------------------------------------------------------------------------------------

    def run(self, names: Sequence[str], x: Tensor) -> Tensor:
        """(batch, channels, …) -> the same, normalised by the adapters' statistics, or the base's."""
        base: Any = self._modules["base_layer"]
        if not (tensors := self._combined(names)):
            return base(x)  # type: ignore[no-any-return]
        # Gradient checkpointing's second forward is of a batch that was counted in the first.
        if base.training and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        # A replica on another device has only the newest adapter's there.
        tensors = {name: tensor.to(x.device) for name, tensor in tensors.items()}
        dtype = tensors["running_mean"].dtype  # PEFT widens an adapter's tensors only
        for name in ("weight", "bias"):
            if (parameter := getattr(base, name)) is not None and parameter.dtype != dtype:
                tensors[name] = parameter.to(dtype)
        return call_with(base, tensors, x)  # type: ignore[no-any-return]

    # --- Files -------------------------------------------------------------------------------------------------------

    def to_checkpoint(self, adapter_name: str, prefix: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Statistics of an adapter that has its own; see [`AdapterLayer.to_checkpoint`]."""
        own = self.statistics_of(adapter_name)
        keys = {name: f"{prefix}smn_{name}.{adapter_name}" for name in own}
        return {key: state_dict.get(key, own[name]) for name, key in keys.items()}

    def from_checkpoint(self, adapter_name: str, prefix: str, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """Statistics from an adapter's file, checked; see [`AdapterLayer.from_checkpoint`]."""
        result: dict[str, Tensor] = {}
        for name, own in self.statistics_of(adapter_name).items():
            if (loaded := entries.pop(f"smn_{name}", None)) is None:
                raise KeyError(f"{prefix}smn_{name}")
            if loaded.shape != own.shape or loaded.is_floating_point() != own.is_floating_point():
                raise ValueError(
                    f"{prefix}smn_{name} is {loaded.dtype} {tuple(loaded.shape)}, the base has {own.dtype} "
                    f"{tuple(own.shape)}: load the base model that adapter_config.json names."
                )
            result[f"smn_{name}.{adapter_name}"] = loaded
        return result


def add_batch_norms(model: nn.Module, adapter_name: str, config: MaskConfig, active_adapters: list[str]) -> None:
    """Add an adapter's policy to every BatchNorm of a model except those in `modules_to_save`."""
    held = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, (AdapterLayer, AuxiliaryTrainingWrapper)))
    saved = [(n, m) for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    own = tuple(f"{name}." for name, module in saved if adapter_name in module.modules_to_save)
    wrappers: dict[nn.Module, BatchNorm] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name.startswith(own):  # PEFT saves and switches all of it
            continue
        if isinstance(module, BatchNorm):
            module.update_layer(adapter_name, config, name)
        elif has_statistics(module) and name and not name.startswith(held):
            if module not in wrappers:  # one module may stand in several places
                wrapper = wrappers[module] = BatchNorm(module)
                wrapper.train(module.training)
                wrapper._active_adapter = active_adapters
                wrapper.update_layer(adapter_name, config, name)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, wrappers[module])


@contextmanager
def bare_norms(model: nn.Module, config: MaskConfig) -> Iterator[None]:
    """Unwrap the BatchNorms in `modules_to_save` for the block, so that PEFT copies the base's own.

    Afterwards the wrappers are where they were, or in the original that PEFT keeps beside its copies.
    """
    ends = tuple(config.modules_to_save or ())
    copied = tuple(f"{name}." for name, _ in model.named_modules() if name and ends and name.endswith(ends))
    inside = (module for name, module in model.named_modules() if f"{name}.".startswith(copied))
    bases = {
        module: module.get_base_layer().train(module.training) for module in inside if isinstance(module, BatchNorm)
    }
    _swap(model, bases)
    try:
        yield
    finally:
        _swap(model, {base: wrapper for wrapper, base in bases.items()})
        for wrapper in bases:
            wrapper.train(wrapper.training)


def _swap(model: nn.Module, replacements: Mapping[Any, nn.Module]) -> None:
    """Replace modules wherever they stand in a model."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]
