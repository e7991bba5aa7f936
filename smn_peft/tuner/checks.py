# SPDX-License-Identifier: Apache-2.0
"""Checks before an adapter touches a model: its name, its targets, and whether the base is the one of the adapter."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.weak import WeakIdKeyDictionary

from ..storage.fingerprint import fingerprint, tensor_digest
from .batch_norm import has_statistics
from .config import MaskConfig
from .forms import is_norm, iter_layers, mask_layer_for, type_name
from .layer import MaskLayer
from .targets import base_model_of, head_modules, vision_scope
from .wrapper import adapter_layers

__all__ = [
    "base_fingerprint",
    "base_name",
    "check_adapter_name",
    "check_base",
    "check_base_kind",
    "check_saved",
    "check_targets",
    "fingerprint_of",
    "fingerprints",
    "masked_parameters",
    "unmasked_tensors",
]

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
    """Refuse a name that would make PEFT lose another adapter's tensors when it saves (peft#3584)."""
    if not name or "." in name:
        raise ValueError(f"{name!r} cannot name an adapter: it must not be empty nor hold a dot. Choose another name.")
    own = (path for path, _ in (*model.named_parameters(), *model.named_buffers()) if "smn_" not in path)
    for path in (*_WRAPPED, *(path for path, _ in model.named_modules()), *own):
        if name in path.split("."):
            raise ValueError(
                f"{name!r} cannot name an adapter: PEFT filters state dicts by names, and it is part of {path!r}. "
                f"Choose another name, such as {name + '_task'!r}."
            )


def check_base_kind(model: nn.Module) -> None:
    """Refuse quantised bases."""
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"Quantised base models are not supported yet: {_UNQUANTISED}")
    for name, module in model.named_modules():
        if _QUANTISED.search(kind := type_name(module)):
            raise ValueError(f"{name!r} is quantised ({kind}), which is not supported yet: {_UNQUANTISED}")


def check_saved(model: nn.Module, names: Sequence[str] | None) -> None:
    """Refuse `modules_to_save` that name nothing, or a part of what another adapter trains whole."""
    ends = tuple(names or ())
    if not names:
        return
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


def check_targets(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse targets that have no masked form: norms, unsupported types, tied, sharded or offloaded weights."""
    tied = tied_parameters(model)
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, MaskLayer):
            continue
        problem, form = _layer_problem(name, module, model), mask_layer_for(module)
        for slot in form(module).present_slots if form is not None and problem is None else ():
            if problem := problem or _tensor_problem(module, slot.path):
                break
            if same := tied.get(f"{name}.{slot.path}"):
                problem = (
                    f"is tied: {', '.join(same)} are one tensor, and a mask on one would untie or change the other in "
                    "silence. Leave it out with exclude_modules, or untie the weights first."
                )
        if problem is not None:
            raise ValueError(f"Target {name!r} {problem}")


def tied_parameters(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter that two modules hold, or one that stands in two places, by each of them.

    A module that stands in several places because its parent does has one place, its parent's.
    """
    owners: dict[int, set[tuple[int, str]]] = defaultdict(set)
    names: dict[int, list[str]] = defaultdict(list)
    modules = list(model.named_modules(remove_duplicate=False))
    for path, module in modules:
        for attribute, part in (*module._parameters.items(), *module._modules.items()):
            owners[id(part)].add((id(module), attribute))
        for attribute, parameter in module._parameters.items():
            names[id(parameter)].append(f"{path}.{attribute}".removeprefix("."))
    return {
        name: sorted(names[id(parameter)])
        for _, module in modules
        for parameter in module._parameters.values()
        if parameter is not None and max(len(owners[id(parameter)]), len(owners[id(module)])) > 1
        for name in names[id(parameter)]
    }


def _is_offloaded(module: nn.Module) -> bool:
    hooks = [getattr(module, "_hf_hook", None)]
    hooks += list(getattr(hooks[0], "hooks", ()))
    return any(getattr(hook, "offload", False) for hook in hooks)


def _layer_problem(name: str, module: nn.Module, model: nn.Module) -> str | None:
    """What keeps a layer from being masked, and what to do."""
    kind, outer = type(module).__name__, name.rpartition(".")[0]
    if is_norm(module):
        return (
            f"is a norm layer ({kind}). Masking norms ruins a pretrained model (paper, Table 5b): take it out of "
            "target_modules. For BatchNorm statistics see batch_norm='adapt'."
        )
    if isinstance(model.get_submodule(outer), nn.MultiheadAttention):
        return f"is inside an nn.MultiheadAttention, which never calls it: target the attention itself: {outer!r}."
    if _is_offloaded(module):
        return "is offloaded to CPU or disk by accelerate, which is not supported yet: load it without device_map."
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "is an Embedding with max_norm, which rewrites its weights: set it to None."
    if is_parametrized(module):
        return (
            "is parametrized: its parameters are computed for every forward. Keep their values first, with "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight'), or use exclude_modules."
        )
    if mask_layer_for(module) is None:
        return (
            f"is a {type(module).__module__}.{kind}, which has no masked form. Supported are, by exact type, Linear, "
            "Conv1d/2d/3d and their transposed forms, Embedding, MultiheadAttention, transformers' Conv1D and timm's "
            "Conv2dSame and (Scaled)StdConv2d(Same). explain_targets(model) lists what a model has."
        )
    return None


def _tensor_problem(module: nn.Module, path: str) -> str | None:
    """What keeps a tensor of a layer from being masked, and what to do."""
    owner, _, attribute = path.rpartition(".")
    layer = module.get_submodule(owner)
    weight = layer._parameters.get(attribute)
    if weight is None:  # hooks compute it before every forward
        what, remedy = "whoever set it", f"layer.{attribute} = torch.nn.Parameter(layer.{attribute})"
        if f"{attribute}_g" in layer._parameters:
            what, remedy = "weight_norm", "torch.nn.utils.remove_weight_norm(layer)"
        elif f"{attribute}_mask" in layer._buffers:
            what, remedy = "pruning", f"torch.nn.utils.prune.remove(layer, {attribute!r})"
        elif f"{attribute}_orig" in layer._parameters:
            what, remedy = "spectral_norm", "torch.nn.utils.remove_spectral_norm(layer)"
        return (
            f"has no parameter {path}: {what} computes it before every forward. Keep its value first, with "
            f"{remedy}, or leave the layer out with exclude_modules."
        )
    kind = type(weight)
    if hasattr(weight, "ds_id"):
        return "is partitioned by DeepSpeed's ZeRO-3, which is not supported: use ZeRO-1 or 2, which leave it whole."
    if kind.__name__ == "DTensor":
        return (
            "is sharded over a device mesh (DTensor), which is not supported: with tensor parallelism load the base "
            "without tp_plan; with FSDP add the adapter before the model is sharded."
        )
    if kind is not Tensor and nn.Parameter not in kind.__mro__ and kind.__name__ not in _STAND_INS:
        return f"is quantised or packed ({kind.__module__}.{kind.__name__}), not supported yet: {_UNQUANTISED}"
    if weight.dtype not in _FLOATS:
        return f"is {weight.dtype}, not supported yet: load the base in float32, bfloat16 or float16."
    return None


# --- Which base an adapter belongs to --------------------------------------------------------------------------------

#: What is resampled when the same base is loaded for images of another size.
_POSITIONS = re.compile(
    r"(?:^|[._])(?:pos(?:ition(?:al)?)?_?emb\w*|rel(?:ative)?_pos\w*|pos_bias\w*|attention_biases\w*|attn_mask|rope\w*)"
    r"(?:$|\.)"
)
_digests: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor -> (version, place, digest)


def _digest(tensor: Tensor) -> str:
    version = -1 if tensor.is_inference() else tensor._version
    known = _digests.get(tensor)
    if known is None or known[:2] != (version, tensor.data_ptr()):
        known = (version, tensor.data_ptr(), tensor_digest(tensor))
        _digests[tensor] = known
    return str(known[2])


def base_fingerprint(model: nn.Module, adapter_name: str) -> str | None:
    """Fingerprint of the base weights that an adapter masks, whatever is merged; None if there are none or no data."""
    weights = _masked_tensors(model, adapter_name)
    return fingerprint_of(model, weights) if weights else None


def _masked_tensors(model: nn.Module, adapter_name: str) -> list[Tensor]:
    layers = [layer for _, layer in adapter_layers(model) if isinstance(layer, MaskLayer)]
    return [layer.base_tensor(slot) for layer in layers for slot in layer.slots_of(adapter_name)]


def unmasked_tensors(model: nn.Module, masked: Collection[str], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors that an adapter's features depend on beside the masked ones, by name in the bare model.

    `masked` is what [`masked_parameters`] gives; of `config`, `batch_norm` and `modules_to_save` count. Left out are
    heads and `modules_to_save`, which may be replaced; with ``batch_norm="adapt"`` the statistics, of which the
    adapter has its own; positions, which are resampled for other sizes of images; integers, a dense pooler (most
    checkpoints hold none) and, of a model with two towers, all but the masked one.
    """
    model = base_model_of(model)
    scope, heads = vision_scope(model), head_modules(model)
    if not all(name.startswith(scope) for name in masked):
        scope = ""
    adapts, saved = config.get("batch_norm") == "adapt", tuple(config.get("modules_to_save") or ())
    result: dict[int, tuple[str, Tensor]] = {}
    apart: tuple[str, ...] = ()  # modules whose tensors do not count; a module comes before its parts
    for name, module in iter_layers(model, parts=True):
        prefix = f"{name}." if name else ""
        pooler = name.rpartition(".")[2] == "pooler" and hasattr(module, "dense")
        if pooler or id(module) in heads or (saved and name and name.endswith(saved)):
            apart = (*apart, prefix)
        if not prefix.startswith(scope) or prefix.startswith(apart):
            continue
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            key = prefix + attribute
            if (
                tensor is not None
                and tensor.is_floating_point()
                and attribute not in module._non_persistent_buffers_set
                and key not in masked
                and not (adapts and attribute in module._buffers and has_statistics(module))
                and not _POSITIONS.search(key)
            ):
                result.setdefault(id(tensor), (key, tensor))
    return dict(result.values())


def masked_parameters(model: nn.Module, adapter_name: str) -> set[str]:
    """Names, in the bare model, of the parameters that an adapter masks."""
    ids = set(map(id, _masked_tensors(model, adapter_name)))
    return {
        f"{name}.{attribute}"
        for name, module in iter_layers(base_model_of(model), parts=True)
        for attribute, parameter in module._parameters.items()
        if id(parameter) in ids
    }


def fingerprint_of(model: nn.Module, tensors: Iterable[Tensor]) -> str | None:
    """Fingerprint of the base's own values of tensors, whatever is merged into them; None if one is not known."""
    own = {key: value for _, layer in adapter_layers(model) for key, value in layer.unmerged().items()}
    values = [own.get(id(tensor), tensor) for tensor in tensors]
    known = [tensor for tensor in values if tensor is not None and tensor.device.type != "meta"]
    if len(known) < len(values):
        return None
    return fingerprint((_digest(tensor) for tensor in known), known[0].dtype if known else torch.float32)


def fingerprints(model: nn.Module, adapter_name: str, config: MaskConfig) -> tuple[str | None, str | None]:
    """Fingerprints of a model's own weights: those that an adapter masks, and all else that its features depend on."""
    rest = unmasked_tensors(model, masked_parameters(model, adapter_name), config.to_dict())
    return base_fingerprint(model, adapter_name), fingerprint_of(model, rest.values())


def check_base(model: nn.Module, adapter_name: str, config: MaskConfig) -> str | None:
    """Refuse a base that is not the adapter's; returns a warning if their dtypes differ, so that none can compare."""
    expected = (config.base_fingerprint, config.unmasked_fingerprint)
    if not config.check_base or expected == (None, None):
        return None
    warning = None
    parts = ("masked weights", "weights or statistics outside the mask")
    for part, known, present in zip(parts, expected, fingerprints(model, adapter_name, config), strict=True):
        if known is None or present is None or known == present:
            continue
        names = f"made for {config.base_model_name_or_path or 'a base without a name'} ({known}), this base is "
        names += f"{base_name(model) or type(model).__name__} ({present})"
        if known.partition(":")[0] == present.partition(":")[0]:
            raise ValueError(
                f"The adapter does not belong to this base model, whose {part} differ: {names}. Load the base that it "
                "names; check_base=False in the config overrides the check."
            )
        warning = warning or f"The adapter's base model cannot be verified in another dtype: {names}."
    return warning


def base_name(model: nn.Module) -> str | None:
    """The Hub id ("timm/resnet50.a1_in1k"), path or timm name of a model's weights; None if nothing is known.

    Of a timm model it is what its `pretrained_cfg` says, even where those weights were not loaded: the fingerprint
    in the adapter's config tells them apart.
    """
    path = getattr(model, "name_or_path", None)
    if isinstance(path, str) and path:
        return path
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    values = config if isinstance(config, dict) else vars(config)
    hub_id, architecture, tag = (values.get(key) or None for key in ("hf_hub_id", "architecture", "tag"))
    return hub_id or (f"{architecture}.{tag}" if architecture and tag else architecture)
