# SPDX-License-Identifier: Apache-2.0
"""What is checked before an adapter touches a model, each with the fix in its message."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .forms import mask_layer_for
from .kinds import READERS, is_norm, iter_layers, type_name
from .layer import MaskLayer
from .norms import norm_form_of

__all__ = [
    "BASE_PREFIX",
    "check_adapter_name",
    "check_base_kind",
    "check_called",
    "check_saved",
    "check_targets",
    "misfit",
]

BASE_PREFIX = "base_model.model."
"""What a `PeftModel` puts before the base model's paths."""

_UNQUANTISED = (
    "a mask needs the float weights. Load the base without quantization_config, or as it was before it was quantised, "
    "for example in bfloat16."
)
# By name, so that nothing is imported to look it up: layers of libraries that quantise, and others by their own.
_QUANTISED = re.compile(
    r"^(?:torch\.(?:ao\.)?nn\.(?:\w+\.)*(?:quantized|qat)|torchao|bitsandbytes|quanto|optimum\.quanto|auto_gptq|gptqmodel|"
    r"awq|hqq|aqlm|eetq|vptq|compressed_tensors)\.(?:.*\.)?\w*(?:Linear|Conv|Embedding)\w*$"
    r"|\.(?:Q|WQ|Quant|Quantized|FP8|Bit|AutoBit|Eetq|HQQ|GPTQ|AWQ)Linear\w*$"
)
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_STAND_INS = ("FakeTensor", "FunctionalTensor")  # of graphs
_WRAPPED = ("base_layer", "modules_to_save", "original_module")  # what PEFT adds to paths


def check_adapter_name(name: str, model: nn.Module) -> None:
    """Refuse a name that would make PEFT lose another adapter's tensors when it saves (peft#3584).

    Raises:
        ValueError: If the name is empty, has a dot, or is a part of a module's path or a parameter's name.
    """
    if not name or "." in name:
        raise ValueError(f"{name!r} cannot name an adapter: it must not be empty nor hold a dot. Choose another name.")
    own = (path for path, _ in (*model.named_parameters(), *model.named_buffers()) if "smn_" not in path)
    for path in (*_WRAPPED, *(path for path, _ in model.named_modules()), *own):
        if name in path.split("."):
            raise ValueError(
                f"{name!r} cannot name an adapter: it is part of the path {path!r}, and PEFT filters state "
                f"dicts by names. Choose another name, such as {name + '_task'!r}."
            )


def check_base_kind(model: nn.Module) -> None:
    """Refuse bases that cannot be masked yet.

    Raises:
        ValueError: If the model is quantised.
    """
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"Quantised base models are not supported yet: {_UNQUANTISED}")
    for name, module in model.named_modules():
        if _QUANTISED.search(kind := type_name(module)):
            raise ValueError(f"{name!r} is quantised ({kind}), which is not supported yet: {_UNQUANTISED}")


def check_saved(model: nn.Module, names: Sequence[str] | None) -> None:
    """Refuse `modules_to_save` that name nothing, or a part of what another adapter trains whole.

    Raises:
        ValueError: If so; names the entry.
    """
    if not names:
        return
    ends = tuple(names)
    if not any(name.endswith(ends) for name, _ in iter_layers(model, parts=True) if name):
        raise ValueError(f"modules_to_save={list(names)!r} names no module of {type(model).__name__}.")
    paths = [name for name, _ in (*model.named_modules(), *iter_layers(model, parts=True)) if name.endswith(ends)]
    for whole in (name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)):
        copies = f"{whole}.modules_to_save."
        for path in paths:
            is_copy = path.startswith(copies) and "." not in path.removeprefix(copies)  # PEFT knows that one
            if path.startswith(f"{whole}.") and not is_copy:
                raise ValueError(
                    f"modules_to_save={list(names)!r} names a part of {whole!r}, which another adapter trains whole: "
                    "name that, or add this adapter to a base of its own."
                )


def check_called(model: nn.Module) -> None:
    """Refuse a mixed batch where a masked layer is read and never called: its samples have one weight.

    Raises:
        ValueError: If there is such a layer.
    """
    for name, module in model.named_modules():
        if type_name(module) in READERS and isinstance(getattr(module, "qkv", None), MaskLayer):
            raise ValueError(
                f"Mixed batches by `adapter_names` are not possible here: {name!r} takes the weight of its masked "
                "`qkv` and never calls it. Run one batch per adapter, or leave it out with exclude_modules."
            )


def check_targets(model: nn.Module, names: Iterable[str], *, norms: bool = False) -> None:
    """Refuse targets that have no masked form, before anything is changed.

    Args:
        model: The base model, possibly with adapters on it.
        names: Names of the modules that would be masked.
        norms: Whether norm layers may be among them.

    Raises:
        ValueError: A norm layer, an unsupported type, tied, quantised, sharded or offloaded weights.
    """
    # A module that stands in several places is wrapped in all of them only where the place is one: its parent's.
    names_of: dict[int, set[str]] = defaultdict(set)
    owners: dict[int, set[tuple[int, str]]] = defaultdict(set)
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, part in (*module._parameters.items(), *module._modules.items()):
            owners[id(part)].add((id(module), attribute))
        for attribute, parameter in module._parameters.items():
            names_of[id(parameter)].add(f"{path}.{attribute}")
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, MaskLayer):
            continue
        form = norm_form_of(module) if norms else None
        if form is None:
            _check_type(name, module, model)
            form = mask_layer_for(module)
        assert form is not None
        for slot in form(module).present_slots if not _is_offloaded(module) else ():
            _check_recomputed(name, module, slot.path)
            weight = module.get_parameter(slot.path)
            _check_weight(name, weight)
            if len(owners[id(weight)]) > 1 or len(owners[id(module)]) > 1:
                tied = ", ".join(sorted(names_of[id(weight)]))
                raise ValueError(
                    f"The weight of target {name!r} is tied: {tied} are one tensor. A mask on one would untie it or "
                    "change the other in silence. Leave it out with exclude_modules, or untie the weights first."
                )


def _is_offloaded(module: nn.Module) -> bool:
    hooks = [getattr(module, "_hf_hook", None)]
    hooks += list(getattr(hooks[0], "hooks", ()))
    return any(getattr(hook, "offload", False) for hook in hooks)


def _check_type(name: str, module: nn.Module, model: nn.Module) -> None:
    kind = type(module).__name__
    parent = model.get_submodule(name.rpartition(".")[0])
    if is_norm(module):
        raise ValueError(
            f"Target {name!r} is a norm layer ({kind}). Masking norms ruins a pretrained model (paper, Table 5b): "
            "take it out of target_modules, or set mask_norms=True to see it. For BatchNorm statistics see "
            "batch_norm='adapt'."
        )
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"Target {name!r} is inside an nn.MultiheadAttention, which never calls it: a mask there would do "
            f"nothing. Target the attention itself: {name.rpartition('.')[0]!r}."
        )
    if _is_offloaded(module):
        raise ValueError(
            f"The weights of target {name!r} are offloaded to CPU or disk by accelerate, which is not supported yet: "
            "load the base without device_map, or with one that keeps it on the device."
        )
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise ValueError(f"Target {name!r} is an Embedding with max_norm, which rewrites its weights: set it to None.")
    if is_parametrized(module):
        raise ValueError(
            f"The parameters of target {name!r} are computed by a parametrization for every forward. Keep their "
            "values first, with torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight'), or leave the "
            "layer out with exclude_modules."
        )
    if mask_layer_for(module) is None:
        raise ValueError(
            f"Target {name!r} is a {type(module).__module__}.{kind}, which has no masked form. Supported are, by "
            "exact type, Linear, Conv1d/2d/3d and their transposed forms, Embedding, MultiheadAttention, "
            "transformers' Conv1D and timm's Conv2dSame and (Scaled)StdConv2d(Same). explain_targets(model) lists "
            "what a model has."
        )


def _check_recomputed(name: str, module: nn.Module, path: str) -> None:
    """Refuse a tensor that hooks make anew for every forward, from others."""
    owner, _, attribute = path.rpartition(".")
    layer = module.get_submodule(owner)
    if attribute in layer._parameters:
        return
    if f"{attribute}_g" in layer._parameters:
        what, remedy = "weight_norm", "torch.nn.utils.remove_weight_norm(layer)"
    elif f"{attribute}_mask" in layer._buffers:
        what, remedy = "pruning", f"torch.nn.utils.prune.remove(layer, {attribute!r})"
    elif f"{attribute}_orig" in layer._parameters:
        what, remedy = "spectral_norm", "torch.nn.utils.remove_spectral_norm(layer)"
    else:
        what, remedy = "whoever set it", f"layer.{attribute} = torch.nn.Parameter(layer.{attribute})"
    raise ValueError(
        f"The {path} of target {name!r} is no parameter: {what} computes it before every forward, and a mask would be "
        f"undone. Keep its value first, with {remedy}, or leave the layer out with exclude_modules."
    )


def _check_weight(name: str, weight: Tensor) -> None:
    kind = type(weight)
    if hasattr(weight, "ds_id"):
        raise ValueError(
            f"The weight of target {name!r} is partitioned by DeepSpeed's ZeRO-3, which is not supported: use ZeRO-1 "
            "or 2, which shard what trains and leave the frozen base whole."
        )
    if kind.__name__ == "DTensor":
        raise ValueError(
            f"The weight of target {name!r} is sharded over a device mesh (DTensor), which is not supported: with "
            "tensor parallelism load the base without tp_plan and use data parallelism; with FSDP add the adapter "
            "before the model is sharded."
        )
    if kind is not Tensor and nn.Parameter not in kind.__mro__ and kind.__name__ not in _STAND_INS:
        raise ValueError(
            f"The weight of target {name!r} is quantised or packed ({kind.__module__}.{kind.__name__}), which is not "
            f"supported yet: {_UNQUANTISED}"
        )
    if weight.dtype not in _FLOATS:
        raise ValueError(
            f"The weight of target {name!r} is {weight.dtype}. Quantised weights are not supported yet: load the base "
            "in float32, bfloat16 or float16."
        )


def misfit(missing: Sequence[str], strange: Sequence[str]) -> ValueError:
    """The error for an adapter's file whose masks are not those of the model.

    Args:
        missing: Keys of masks that the model wants and the file does not have.
        strange: Keys of masks that the file has and the model does not want.
    """
    return ValueError(
        f"The adapter's masks do not fit this model: {len(missing)} missing ({', '.join(missing[:3])} …), "
        f"{len(strange)} that no masked layer takes ({', '.join(strange[:3])} …). If the module paths differ "
        "between versions of transformers, pass key_mapping to from_pretrained: "
        "smn_peft.backbones.clip_key_mapping() gives CLIP's."
    )
