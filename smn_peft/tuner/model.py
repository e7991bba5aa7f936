# SPDX-License-Identifier: Apache-2.0
"""`MaskModel`: masks injected into a model, with PEFT's life cycle and PEFT's state-dict hooks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..functional.masking import progressive_density
from .adapters import AdapterLayer
from .base_name import base_name
from .batch_norm import add_batch_norms
from .checks import check_adapter_name, check_base_kind, check_called, check_saved, check_targets
from .config import MaskConfig
from .forms import mask_layer_for
from .identity import check_base
from .layer import MaskLayer
from .norms import norm_form_of, with_norms
from .reload import check_pair, settings_in, under_settings
from .rollback import discard, whole_or_nothing
from .rounding import widened
from .saved_norms import bare_norms, parts_shown, unwrap_rest
from .state_dict import entries_of, loaded_entries
from .targets import resolve_targets
from .traversal import adapter_layers, bare_key, uncompiled

__all__ = ["MaskModel"]


def _pass_adapter_names(module: nn.Module, args: Any, kwargs: dict[str, Any], names: list[str]) -> tuple[Any, Any]:
    return args, {**kwargs, "adapter_names": names}


class MaskModel(BaseTuner):
    """Binary masks over a frozen model (Self-Masking Networks, GCPR 2024) as a PEFT method.

    Made by `get_peft_model(model, MaskConfig(...))`; it has everything that PEFT's users know from LoRA.
    """

    prefix: str = "smn_"
    tuner_layer_cls = AdapterLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        """As PEFT's: a dict of configurations comes from a `PeftModel`, a lone one from `inject_adapter_in_model`."""
        self._is_native = not isinstance(peft_config, dict)
        super().__init__(uncompiled(model), peft_config, adapter_name, **kwargs)

    # --- Injection ---------------------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's. Everything that can be wrong is checked before the model is touched.

        Raises:
            ValueError: For a bad adapter name, a base that is not supported or not the adapter's, or a bad target.
        """
        given: MaskConfig = self.peft_config[adapter_name]  # type: ignore[assignment]
        check_adapter_name(adapter_name, model)
        check_base_kind(uncompiled(model))
        check_saved(model, given.modules_to_save)
        if any(adapter_name in layer.smn_info for _, layer in adapter_layers(model)):
            raise ValueError(f"Adapter with name {adapter_name!r} already exists: delete it or choose another name.")
        config = self.peft_config[adapter_name] = given.for_model(native=self._is_native)
        with whole_or_nothing(model, adapter_name):
            with bare_norms(model, config), parts_shown(model):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._verify(model, adapter_name, config)
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = base_name(model)

    def _prepare_adapter_config(self, peft_config: MaskConfig, model_config: dict[str, Any]) -> MaskConfig:  # type: ignore[override]
        return peft_config

    def _prepare_model(self, peft_config: MaskConfig, model: nn.Module) -> None:  # type: ignore[override]
        """Resolve the shorthands of `target_modules`, and check what they match."""
        targets = peft_config.target_modules
        resolved = resolve_targets(
            model,
            targets,
            layers_to_transform=peft_config.layers_to_transform,
            layers_pattern=peft_config.layers_pattern,
        )
        if resolved is not targets:  # the layers are in the names now; PEFT would look for them in a regex in vain
            peft_config.layers_to_transform = peft_config.layers_pattern = None
        peft_config.target_modules = set(resolved) if isinstance(resolved, list) else resolved  # type: ignore[assignment]
        _maybe_include_all_linear_layers(peft_config, model)  # now, and not after this hook: what it finds is checked
        if peft_config.mask_norms:
            exact = with_norms(model, peft_config.target_modules or ())
            peft_config.target_modules = set(exact) if isinstance(exact, list) else exact  # type: ignore[assignment]
        inside = tuple(f"{name}." for name, _ in adapter_layers(model))
        matched = [
            name
            for name, _ in model.named_modules()
            if name and not name.startswith(inside) and check_target_module_exists(peft_config, name)
        ]
        check_targets(model, matched, norms=peft_config.mask_norms)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """As PEFT's, which looks for the adapter's `modules_to_save` next, by the ends of names: in the base alone."""
        super()._mark_only_adapters_as_trainable(model)
        for _, layer in adapter_layers(model):
            layer.hides_parts = True

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: MaskConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, MaskLayer):
            target.update_layer(adapter_name, peft_config, current_key)
            return
        form = mask_layer_for(target) or (norm_form_of(target) if peft_config.mask_norms else None)
        if form is None:  # named by a state dict and not by the config, which was checked before
            check_targets(self.model, [current_key])
        assert form is not None
        layer = form(target)
        layer.update_layer(adapter_name, peft_config, current_key)
        layer.train(target.training)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Wrap a layer, or unwrap it: the tensors are the same ones, so there is nothing to move or to copy."""
        setattr(parent, child_name, new_module)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        model: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        unwrap_rest(model, merge, safe_merge, adapter_names)
        return model

    def _verify(self, model: nn.Module, adapter_name: str, config: MaskConfig) -> None:
        """Add the BatchNorm policy, and refuse a base that is not the adapter's."""
        if warning := check_base(model, adapter_name, config):
            warnings.warn(warning, stacklevel=4)
        add_batch_norms(model, adapter_name, config, self.active_adapters)
        for encoder in (m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)):
            for _, layer in adapter_layers(encoder):
                layer.forbid_fast_path()

    # --- State dicts -------------------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]
        cls,
        model: nn.Module,
        config: MaskConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
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

        Raises:
            ValueError: If masks are missing, do not fit, or belong to no masked layer, or the file is of another base.
                An adapter that was being loaded is then taken off the model again; one that was there stays as it was.
        """
        if not config.being_loaded:  # then its config was not read from this file's folder
            with under_settings(model, adapter_name, settings_in(state_dict)) as config:
                return widened(model, loaded_entries(model, adapter_name, state_dict, config.base_fingerprint))
        try:
            check_pair(config, settings_in(state_dict))
            entries = loaded_entries(model, adapter_name, state_dict, config.base_fingerprint)
        except Exception:
            discard(model, adapter_name)
            raise
        config.being_loaded = config.awaits_blob = False
        return widened(model, entries)

    # --- What only masks have ----------------------------------------------------------------------------------------

    def masks(self, adapter_name: str | None = None) -> dict[str, Tensor]:
        """Bool masks by weight name, of one adapter (the first active one if None)."""
        name = adapter_name or self.active_adapters[0]
        return {
            f"{path}.{slot.path}": layer.mask(name, slot)
            for path, layer in adapter_layers(self.model)
            if name in layer.smn_info
            for slot in layer.smn_info[name].slots
        }

    def density(self, adapter_name: str | None = None) -> float:
        """Fraction of an adapter's weights that are active (the paper's "sparsity")."""
        masks = self.masks(adapter_name).values()
        return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    def update_density(self, progress: float, adapter_name: str | None = None) -> None:
        """Move a topk adapter along its `density_schedule`.

        Args:
            progress: Fraction of training done, 0 to 1.
            adapter_name: The first active adapter if None.
        """
        name = adapter_name or self.active_adapters[0]
        config: MaskConfig = self.peft_config[name]  # type: ignore[assignment]
        if config.density_schedule is None or config.density is None:
            raise ValueError(f"Adapter {name!r} has no density_schedule: set density_schedule='linear' in its config.")
        density = progressive_density(progress, config.density)
        for _, layer in adapter_layers(self.model):
            if isinstance(layer, MaskLayer) and name in layer.smn_info:
                layer.update_density(name, density)

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

        Raises:
            ValueError: For an unknown adapter or combination type, adapters of different targets, or weights that do
                not fit.
        """
        from .combine import combine_adapters

        combine_adapters(self, list(adapters), weights, adapter_name, combination_type)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Mixed batches: pass `adapter_names`, one per sample ("__base__" for none), to every layer."""
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
        check_called(self.model)
        beams = kwargs.get("num_beams") or 1
        parts = [(self.model, [name for name in names for _ in range(beams)])]
        if beams > 1 and getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            parts.append((self.model.get_encoder(), list(names)))  # beam search repeats what comes out of it
        with ExitStack() as stack:
            for part, own in parts:
                hook = partial(_pass_adapter_names, names=own)
                for module in part.modules():
                    if isinstance(module, (AdapterLayer, AuxiliaryTrainingWrapper)):
                        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                        stack.callback(handle.remove)
            yield
