# SPDX-License-Identifier: Apache-2.0
"""`MaskModel`: masks injected into a model, with PEFT's life cycle.

What is overridden of PEFT's, and why: `inject_adapter` checks before the model is touched, and takes back what fails;
`_mark_only_adapters_as_trainable` hides the parts of masked layers, since `modules_to_save` goes by the ends of names;
`_replace_module` would copy `weight` and `bias`, which may be masked; `_unload_and_optionally_merge` leaves layers
inside the wrappers that it takes off; scores become bits in a file, and bits scores or buffers, checked.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from ..functional.distributed import unsharded
from ..functional.masking import code_length, density, progressive_density
from ..functional.packing import binary_entropy
from .batch_norm import BatchNorm, add_batch_norms, bare_norms
from .checks import (
    base_name,
    check_adapter_name,
    check_base,
    check_base_kind,
    check_granularity,
    check_saved,
    check_targets,
)
from .config import MaskConfig
from .forms import COMPILED, mask_layer_for, type_name
from .layer import MaskLayer
from .mixed import mixed_batch
from .state_dict import bare_key, check_pair, entries_of, loaded_entries, reload_entries
from .targets import resolve_targets, short_pattern, unit_targets
from .wrapper import AdapterLayer, adapter_layers

COMBINATIONS = ("union", "intersection", "majority")


class MaskModel(BaseTuner):
    """Binary masks over a frozen model (Self-Masking Networks, GCPR 2024) as a PEFT method.

    Made by `get_peft_model(model, MaskConfig(...))`; it has everything that PEFT's users know from LoRA.
    """

    prefix: str = "smn_"
    tuner_layer_cls = AdapterLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        """Wrap a model: a dict of configurations comes from a `PeftModel`, one from `inject_adapter_in_model`."""
        self._is_native = not isinstance(peft_config, dict)  # then a loader may write to the model without PeftModel
        super().__init__(_uncompiled(model), peft_config, adapter_name, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter's layers to a model, as PEFT does; on any error the model is as it was."""
        given: MaskConfig = self.peft_config[adapter_name]  # type: ignore[assignment]
        check_adapter_name(adapter_name, model)
        check_base_kind(_uncompiled(model))
        check_saved(model, given.modules_to_save)
        if any(adapter_name in layer.smn_info for _, layer in adapter_layers(model)):
            raise ValueError(f"Adapter with name {adapter_name!r} already exists: delete it or choose another name.")
        config = self.peft_config[adapter_name] = given.for_model()
        with self._whole_or_nothing(model, adapter_name):
            _resolve(config, model)
            with bare_norms(model, config):
                try:
                    super().inject_adapter(model, adapter_name, *args, **kwargs)
                finally:
                    _hide_parts(model, False)
            if warning := check_base(model, adapter_name, config):
                warnings.warn(warning, stacklevel=4)
            add_batch_norms(model, adapter_name, config, self.active_adapters)
            for encoder in (m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)):
                for _, layer in adapter_layers(encoder):
                    if not layer._forward_pre_hooks:  # a hook keeps torch from its fused layer of the frozen weights
                        layer.register_forward_pre_hook(_no_hook)
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = base_name(model)

    @contextmanager
    def _whole_or_nothing(self, model: nn.Module, adapter_name: str) -> Iterator[None]:
        """Withdraw an adapter if the block fails: unwrap layers that no other uses, restore what was trainable."""
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            yield
        except Exception:
            self.peft_config.pop(adapter_name, None)
            for name, layer in list(adapter_layers(model)):
                if adapter_name in layer.smn_info:
                    layer.delete_adapter(adapter_name)
                if not layer.smn_info:
                    _replace(model, name, layer.get_base_layer())
            for parameter in trainable:
                parameter.requires_grad_(True)
            raise

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        _hide_parts(model, True)

    def _create_and_replace(  # type: ignore[override]
        self, peft_config: MaskConfig, adapter_name: str, target: Any, target_name: str, parent: Any, current_key: str
    ) -> None:
        layer = target
        if not isinstance(layer, MaskLayer):
            if (form := mask_layer_for(target)) is None:  # a state dict may name what the config does not
                check_targets(self.model, [current_key])
            layer = form(target).train(target.training)  # type: ignore[misc]
            self._replace_module(parent, target_name, layer, target)
        check_granularity(peft_config, current_key, layer)
        may_load = self._is_native or peft_config.comes_from_file
        layer.update_layer(adapter_name, peft_config, current_key, may_load=may_load)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    def _unload_and_optionally_merge(
        self, merge: bool = True, progressbar: bool = False, safe_merge: bool = False, adapter_names: Any = None
    ) -> Any:
        model: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for name, layer in list(adapter_layers(model)):
            if merge:
                layer.merge(safe_merge, adapter_names)
            _replace(model, name, layer.get_base_layer())
        return model

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]
        cls, model: nn.Module, config: MaskConfig, adapter_name: str, state_dict: dict[str, Tensor], **_: Any
    ) -> dict[str, Tensor]:
        """Bits of the adapter, packed from the scores of the passed (gathered) state dict; statistics beside them."""
        return entries_of(model, config, adapter_name, state_dict)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return bare_key(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(  # type: ignore[override]
        cls, model: nn.Module, config: MaskConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Bits from a file, checked, to where this model wants them: buffers for inference, scores for training.

        On any error an adapter that was being loaded is taken off the model again; one that was there stays as it was.
        """
        layers = [layer for _, layer in adapter_layers(model) if isinstance(layer, MaskLayer)]
        if config.comes_from_file and any(adapter_name in layer.pending for layer in layers):
            try:
                check_pair(config, state_dict)
                entries = loaded_entries(model, adapter_name, state_dict)
            except Exception:
                tuner: Any = getattr(model, "base_model", None)
                if isinstance(tuner, cls) and len(tuner.peft_config) > 1:
                    model.delete_adapter(adapter_name)  # type: ignore[operator]
                elif isinstance(tuner, cls):  # injected without a PeftModel, PEFT has nothing that could take it back
                    tuner.unload()
                raise
        else:
            entries = reload_entries(model, adapter_name, state_dict)
        for layer in layers:
            layer.mark_loaded(adapter_name)
        return entries

    def masks(self, adapter_name: str | None = None) -> dict[str, Tensor]:
        """Bool masks by weight name, of one adapter (the first active one if None)."""
        return dict(self.iter_masks(adapter_name))

    def iter_masks(self, adapter_name: str | None = None) -> Iterator[tuple[str, Tensor]]:
        """Iterate over [`masks`], of which only one is then in memory."""
        name = adapter_name or self.active_adapters[0]
        for path, layer in adapter_layers(self.model):
            for slot in layer.slots_of(name) if isinstance(layer, MaskLayer) else ():
                yield f"{path}.{slot.path}", layer.mask(name, slot)

    def density(self, adapter_name: str | None = None) -> float:
        """Fraction of an adapter's weights that are active (the paper's "sparsity")."""
        counts = [(int(mask.sum()), mask.numel()) for _, mask in self.iter_masks(adapter_name)]
        return sum(active for active, _ in counts) / sum(total for _, total in counts)

    def bits_per_weight(self, adapter_name: str | None = None) -> float:
        """Mean entropy of an adapter's masks in bits per weight: what a coded file takes for them."""
        name, bits, weights = adapter_name or self.active_adapters[0], 0.0, 0
        for layer in (layer for _, layer in adapter_layers(self.model) if isinstance(layer, MaskLayer)):
            for slot in layer.slots_of(name):
                parts = [] if layer.goes_with_row(name, slot) else layer.mask_parts(name, slot)
                bits += sum(part.numel() * binary_entropy(density(part)) for part in parts)
                weights += layer.base_tensor(slot).numel()
        return bits / weights

    def rate(self) -> Tensor | None:
        """Compute ``config.rate`` · bits per weight of the active adapters that train; None if none has a rate.

        A term of the loss. The bits are those of [`code_length`], with a gradient that pulls scores that fell back to
        their start. `smn train` adds it; add it to a loss of your own, and under transformers' `Trainer` to that of
        its ``compute_loss``.

        Returns:
            A 0-dim fp32 tensor.
        """
        rates = [(name, config.rate) for name in self.active_adapters if (config := self.peft_config[name]).rate]  # type: ignore[attr-defined]
        lengths = [(rate, *self.code_length(name)) for name, rate in rates]
        terms = [rate / weights * bits for rate, bits, weights in lengths if weights]
        return torch.stack(terms).sum().float() if terms else None

    def code_length(self, adapter_name: str | None = None, offset: float = 0.0) -> tuple[Tensor, int]:
        """Compute the bits that an adapter's masks take at their entropy, see `functional.masking.code_length`.

        Args:
            adapter_name: An adapter with threshold masks; None: the first active one.
            offset: Added to its threshold.

        Returns:
            The bits, a 0-dim tensor whose gradient goes to the scores, and the number of weights; of what trains.
        """
        name = adapter_name or self.active_adapters[0]
        config: MaskConfig = self.peft_config[name]  # type: ignore[assignment]
        bits, weights, start = [], 0, config.init_score
        masked = [layer for _, layer in adapter_layers(self.model) if isinstance(layer, MaskLayer)]
        for layer in masked:
            for slot in layer.slots_of(name):
                scores = [own for own in layer.scores_of(name, slot).values() if own.requires_grad]
                if scores and not layer.goes_with_row(name, slot):
                    trainable = layer.trainable(name, slot)
                    threshold = config.threshold + offset
                    bits += [code_length(unsharded(own), threshold, float(start), trainable) for own in scores]
                    weights += layer.base_tensor(slot).numel()
        device = bits[0].device if bits else torch.device("cpu")
        return torch.stack([part.to(device) for part in bits]).sum() if bits else torch.zeros(()), weights

    def update_density(self, progress: float, adapter_name: str | None = None) -> None:
        """Move a topk adapter (the first active one if None) along its `density_schedule`; `progress` is 0 to 1."""
        name = adapter_name or self.active_adapters[0]
        config: MaskConfig = self.peft_config[name]  # type: ignore[assignment]
        if config.density_schedule is None or config.density is None:
            raise ValueError(f"Adapter {name!r} has no density_schedule: set density_schedule='linear' in its config.")
        for _, layer in adapter_layers(self.model):
            if isinstance(layer, MaskLayer) and layer.slots_of(name):
                layer.update_density(name, progressive_density(progress, config.density))

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float] | None = None,
        adapter_name: str = "combined",
        combination_type: str = "majority",
    ) -> None:
        """Add an adapter whose mask combines others', for inference.

        Args:
            adapters: Names of the adapters to combine; they must mask the same modules.
            weights: Weight of each in the vote of ``"majority"``; equal if None.
            adapter_name: Name of the new adapter.
            combination_type: ``"union"``, ``"intersection"`` or ``"majority"`` (active where more than half of the
                weight says so).
        """
        names, known = list(adapters), self.peft_config
        votes = [1.0] * len(names) if weights is None else list(weights)
        if combination_type not in COMBINATIONS:
            raise ValueError(f"combination_type must be one of {', '.join(COMBINATIONS)}; got {combination_type!r}.")
        if unknown := [name for name in names if name not in known] or not names:
            raise ValueError(f"Adapter(s) {unknown if names else '[]'} do not exist, only {list(known)}.")
        if adapter_name in known:
            raise ValueError(f"Adapter with name {adapter_name!r} already exists: delete it or choose another name.")
        if len(votes) != len(names) or min(votes) < 0 or sum(votes) <= 0:
            raise ValueError(f"weights must be {len(names)} non-negative numbers, not all 0; got {votes}.")
        modules = list(self.model.modules())
        layers = [module for module in modules if isinstance(module, MaskLayer)]
        if any(layer.slots_of(name) != layer.slots_of(names[0]) for layer in layers for name in names):
            raise ValueError(f"The adapters {names} do not mask the same weights and cannot be combined.")
        saved = [module.modules_to_save for module in modules if isinstance(module, ModulesToSaveWrapper)]
        heads = [[(copies, copies[name]) for name in names if name in copies] for copies in saved]
        if both := sum(len(found) > 1 for found in heads):
            raise ValueError(
                "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
                f"{both} such instance(s): masks combine, heads do not. Combine adapters without modules_to_save."
            )
        configs: list[Any] = [known[name] for name in names]
        known[adapter_name] = config = copy.deepcopy(configs[0])
        config.inference_mode, config.save_scores = True, False
        config.batch_norm = "adapt" if any(other.batch_norm == "adapt" for other in configs) else "frozen"
        config.modules_to_save = list(dict.fromkeys(n for c in configs for n in c.modules_to_save or ())) or None
        with self._whole_or_nothing(self.model, adapter_name):
            self.inject_adapter(self.model, adapter_name)
            for layer in layers:
                layer.mark_loaded(adapter_name)
                for slot in layer.slots_of(adapter_name):
                    masks = torch.stack([layer.mask(name, slot) for name in names])
                    layer.set_mask(adapter_name, slot, combine_masks(masks, votes, combination_type))
            for norm in (module for module in self.model.modules() if isinstance(module, BatchNorm)):
                norm.average(adapter_name, names, votes)
            for copies, source in (head for found in heads for head in found):
                copies[adapter_name].load_state_dict(source.state_dict())

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Mixed batches: `adapter_names` has one name per sample, "__base__" for none; see [`mixed_batch`]."""
        names: list[str] | None = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError(
                "Cannot pass `adapter_names` when the model is in training mode: call model.eval() first."
            )
        if unknown := sorted(set(names) - set(self.peft_config) - {"__base__"}):
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        if any(layer.merged for _, layer in adapter_layers(self.model)):
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, (Tensor, list))]
        lengths = [len(value) for value in inputs if not isinstance(value, Tensor) or value.dim()]
        if lengths and len(names) not in lengths:
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {lengths[0]} respectively."
            )
        wrappers = [module for module in self.model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        with mixed_batch(self.model, names, wrappers, kwargs.get("num_beams") or 1):
            yield

    def fuse(self) -> MaskModel:
        """Merge the adapters for good; timm's `reparameterize_model` calls it before it folds BatchNorms."""
        self.merge_and_unload()
        return self


def _resolve(config: MaskConfig, model: nn.Module) -> None:
    """Resolve the shorthands of `target_modules`, and check what they match."""
    given = config.target_modules
    targets = resolve_targets(
        model,
        given,
        granularity=config.granularity,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
    )
    if given is None and config.granularity.endswith("+weight"):  # of the other targets every weight for itself
        own: Any = dict.fromkeys(short_pattern(model, unit_targets(model, config.granularity)), config.granularity)
        config.granularity, config.granularity_pattern = "weight", {**(config.granularity_pattern or {}), **own}
    if targets is not given:  # the layers are in the names now; PEFT would look for them in a regex in vain
        config.layers_to_transform = config.layers_pattern = None
    config.target_modules = set(targets) if isinstance(targets, list) else targets  # type: ignore[assignment]
    _maybe_include_all_linear_layers(config, model)
    inside = tuple(f"{name}." for name, _ in adapter_layers(model))
    names = (name for name, _ in model.named_modules() if name and not name.startswith(inside))
    check_targets(model, [name for name in names if check_target_module_exists(config, name)])


def combine_masks(masks: Tensor, weights: Sequence[float], combination_type: str) -> Tensor:
    """Combine bool masks (number, …) into one; a majority is more than half of the weight."""
    if combination_type == "union":
        return masks.any(0)
    if combination_type == "intersection":
        return masks.all(0)
    votes = torch.tensor(weights, dtype=torch.float32, device=masks.device)
    share = (masks * votes.reshape(-1, *[1] * (masks.dim() - 1))).sum(0)
    return share > votes.sum() / 2


def _uncompiled(model: nn.Module) -> nn.Module:
    """A model without the wrappers of `torch.compile(module)` around it or its parts; it runs compiled as before.

    They would be in the names of all that lies in them, and an adapter's file would fit no other copy of the base.
    """
    for name, module in list(model.named_modules()):
        if type_name(module) != COMPILED:
            continue
        inner: Any = module.get_submodule("_orig_mod")
        inner._compiled_call_impl = module.dynamo_ctx(inner._call_impl)  # as `inner.compile()` does, with its options
        if not name:
            return _uncompiled(inner)
        _replace(model, bare_key(name), inner)
    return model


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _hide_parts(model: nn.Module, hidden: bool) -> None:
    for layer in (module for module in model.modules() if isinstance(module, AdapterLayer)):
        layer.hides_parts = hidden


def _no_hook(module: nn.Module, args: Any) -> None:
    """See [`MaskModel.inject_adapter`]."""
