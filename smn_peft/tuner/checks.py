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

from ..functional.distributed import is_sharded, unsharded
from ..storage.fingerprint import PARTS, compare_fingerprints, fingerprint, tensor_digest
from .batch_norm import has_statistics
from .config import MaskConfig
from .forms import Embedding, LinearConv1D, is_norm, iter_layers, mask_layer_for, type_name
from .layer import MaskLayer
from .sharding import ZERO3, is_offloaded
from .targets import base_model_of, head_modules, vision_scope
from .wrapper import adapter_layers

_UNQUANTISED = "a mask needs the float weights. Load the base without quantization_config, for example in bfloat16."
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
    if not names:
        return
    own = [name for name, _ in iter_layers(model, parts=True) if name.endswith(tuple(names)) and name]
    if not own:
        raise ValueError(f"modules_to_save={list(names)!r} names no module of {type(model).__name__}.")
    own += [name for name, _ in model.named_modules() if name.endswith(tuple(names))]
    for whole in (name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)):
        inside = (path for path in own if path.startswith(f"{whole}."))
        if any(path.rpartition(".")[0] != f"{whole}.modules_to_save" for path in inside):  # PEFT knows its copies
            raise ValueError(
                f"modules_to_save={list(names)!r} names a part of {whole!r}, which another adapter trains whole: "
                "name that, or add this adapter to a base of its own."
            )


def check_targets(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse targets that have no masked form: norms, unsupported types, tied, sharded or offloaded weights."""
    tied = tied_parameters(model)
    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module, MaskLayer) and (problem := _layer_problem(name, module, model, tied)):
            raise ValueError(f"Target {name!r} {problem}")


def check_granularity(config: MaskConfig, name: str, layer: MaskLayer) -> None:
    """Refuse a layer whose weight does not have the rows, columns or fours that its granularity says."""
    if (kind := config.granularity_of(name)) == "weight":
        return
    for slot in (slot for slot in layer.present_slots if not slot.is_bias):
        shape, base = layer.base_tensor(slot).shape, layer.get_base_layer()
        by_input = isinstance(layer, (Embedding, LinearConv1D)) or getattr(base, "transposed", False)
        why = "does not hold its weights output by output" if by_input else ""
        if kind == "2:4" and shape.numel() // shape[0] % 4:
            why = why or "has no multiple of four inputs"
        elif kind.startswith("column") and getattr(base, "groups", 1) > 1:
            why = why or "reads its inputs in groups"
        if why:
            text = f"Target {name!r} ({type(base).__name__}, {slot.path} {tuple(shape)}) {why}"
            fix = (
                f"granularity_pattern={{{name.rpartition('.')[2]!r}: 'weight'}}"
                if kind != "2:4"
                else "exclude_modules"
            )
            raise ValueError(f"{text}, as granularity={kind!r} needs: leave it out by {fix}.")


def tied_parameters(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter that two modules hold, or one that stands in two places, by each of them.

    A module that stands in several places because its parent does has one place, its parent's.
    """
    places: dict[int, set[tuple[int, str, str]]] = defaultdict(set)
    names: dict[int, list[str]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        parent, _, attribute = path.rpartition(".")
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places[id(parameter)].add((id(model.get_submodule(parent)), attribute, name))
                names[id(parameter)].append(f"{path}.{name}".removeprefix("."))
    tied = (names[key] for key, found in places.items() if len(found) > 1)
    return {name: sorted(same) for same in tied for name in same}


def _layer_problem(name: str, module: nn.Module, model: nn.Module, tied: Mapping[str, list[str]]) -> str | None:
    """What keeps a layer from being masked, and what to do."""
    kind, outer, form = type(module).__name__, name.rpartition(".")[0], mask_layer_for(module)
    if is_norm(module):
        return (
            f"is a norm layer ({kind}), which is never masked: take it out of target_modules; see batch_norm='adapt'."
        )
    if isinstance(model.get_submodule(outer), nn.MultiheadAttention):
        return f"is inside an nn.MultiheadAttention, which never calls it: target the attention itself: {outer!r}."
    if is_offloaded(module):
        return "is offloaded to CPU or disk by accelerate, which is not supported yet: load it without device_map."
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "is an Embedding with max_norm, which rewrites its weights: set it to None."
    if is_parametrized(module):
        keep = "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
        return f"is parametrized, and computed for every forward: keep its value with {keep}, or use exclude_modules."
    if form is None:
        return (
            f"is a {module.__module__}.{kind}, which has no masked form. Supported are, by exact type, Linear, "
            "Conv1d/2d/3d and their transposed forms, Embedding, MultiheadAttention, transformers' Conv1D and timm's "
            "Conv2dSame and (Scaled)StdConv2d(Same). explain_targets(model) lists what a model has."
        )
    for slot in form(module).present_slots:
        if same := tied.get(f"{name}.{slot.path}"):
            return (
                f"is tied: {', '.join(same)} are one tensor. Untie them first, or leave it out with exclude_modules."
            )
        if problem := _tensor_problem(module, slot.path):
            return problem
    return None


def _tensor_problem(module: nn.Module, path: str) -> str | None:
    """What keeps a tensor of a layer from being masked, and what to do."""
    owner, _, name = path.rpartition(".")
    layer = module.get_submodule(owner)
    weight = layer._parameters.get(name)
    if weight is None:  # hooks compute it
        ways = {
            "_g": ("weight_norm", "torch.nn.utils.remove_weight_norm(layer)"),
            "_mask": ("pruning", f"torch.nn.utils.prune.remove(layer, {name!r})"),
            "_orig": ("spectral_norm", "torch.nn.utils.remove_spectral_norm(layer)"),
            "": ("whoever set it", f"layer.{name} = torch.nn.Parameter(layer.{name})"),
        }
        what, keep = next(way for ending, way in ways.items() if hasattr(layer, name + ending))
        return f"has no parameter {path}: {what} computes it. Keep its value with {keep}, or use exclude_modules."
    kind = type(weight)
    if hasattr(weight, "ds_id"):
        return ZERO3
    if is_sharded(weight):
        return (
            "is sharded over a device mesh: load it without tp_plan, or add the adapter before the model is sharded."
        )
    if kind is not Tensor and nn.Parameter not in kind.__mro__ and kind.__name__ not in _STAND_INS:
        return f"is quantised or packed ({kind.__module__}.{kind.__name__}), not supported yet: {_UNQUANTISED}"
    if weight.dtype not in _FLOATS:
        return f"is {weight.dtype}, not supported yet: load the base in float32, bfloat16 or float16."
    return None


#: What is resampled when the same base is loaded for images of another size.
_POSITIONS = re.compile(
    r"(?:^|[._])(?:pos(?:ition(?:al)?)?_?emb\w*|rel(?:ative)?_pos\w*|pos_bias\w*|attention_biases\w*|attn_mask|rope\w*)"
    r"(?:$|\.)"
)
_digests: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor -> (version, place, digest)


def _digest(tensor: Tensor) -> str:
    if is_sharded(tensor):
        return tensor_digest(unsharded(tensor))
    state = (-1 if tensor.is_inference() else tensor._version, tensor.data_ptr())
    if (known := _digests.get(tensor)) is None or known[0] != state:
        known = _digests[tensor] = (state, tensor_digest(tensor))
    return str(known[1])


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
        left_out = module._non_persistent_buffers_set | (
            module._buffers.keys() if adapts and has_statistics(module) else set()
        )
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            key = prefix + attribute
            if tensor is None or not tensor.is_floating_point() or attribute in left_out or key in masked:
                continue
            if not _POSITIONS.search(key):
                result.setdefault(id(tensor), (key, tensor))
    return dict(result.values())


def _masked_tensors(model: nn.Module, adapter_name: str) -> list[Tensor]:
    layers = [layer for _, layer in adapter_layers(model) if isinstance(layer, MaskLayer)]
    return [layer.base_tensor(slot) for layer in layers for slot in layer.slots_of(adapter_name)]


def masked_parameters(model: nn.Module, adapter_name: str) -> set[str]:
    """Names, in the bare model, of the parameters that an adapter masks."""
    ids = set(map(id, _masked_tensors(model, adapter_name)))
    return {
        f"{name}.{attribute}"
        for name, module in iter_layers(base_model_of(model), parts=True)
        for attribute, parameter in module._parameters.items()
        if id(parameter) in ids
    }


def fingerprint_of(
    model: nn.Module, tensors: Iterable[Tensor], gathered: Mapping[int, Tensor] | None = None
) -> str | None:
    """Fingerprint of the base's own values of tensors, whatever is merged into them; None if one is not known.

    `gathered` has the whole of sharded tensors by their `id`; what is not in it all processes gather.
    """
    own: dict[int, Tensor | None] = dict(gathered or {})
    own |= {key: value for _, layer in adapter_layers(model) for key, value in layer.unmerged().items()}
    values = [own.get(id(tensor), tensor) for tensor in tensors]
    known = [tensor for tensor in values if tensor is not None and tensor.device.type != "meta"]
    if len(known) < len(values):
        return None
    return fingerprint((_digest(tensor) for tensor in known), known[0].dtype if known else torch.float32)


def fingerprints(
    model: nn.Module, adapter_name: str, config: MaskConfig, state_dict: Mapping[str, Tensor] | None = None
) -> tuple[str | None, str | None]:
    """Fingerprints of a model's own weights: those that an adapter masks, and all else that its features depend on.

    Sharded tensors are taken from the model's `state_dict` where it is given, gathered or not.
    """
    gathered: dict[int, Tensor] = {}
    if state_dict:  # the live one comes first: with it FSDP2 frees what a forward left gathered
        live = model.state_dict(keep_vars=True).items()
        gathered = {id(tensor): state_dict[key] for key, tensor in live if is_sharded(tensor) and key in state_dict}
    rest = unmasked_tensors(model, masked_parameters(model, adapter_name), config.to_dict())
    masked = _masked_tensors(model, adapter_name)
    own = fingerprint_of(model, masked, gathered) if masked else None
    return own, fingerprint_of(model, rest.values(), gathered)


def check_base(model: nn.Module, adapter_name: str, config: MaskConfig) -> str | None:
    """Refuse a base that is not the adapter's; returns a warning if their dtypes differ, so that none can compare."""
    expected = (config.base_fingerprint, config.unmasked_fingerprint)
    if not config.check_base or expected == (None, None):
        return None
    bases, warning = (config.base_model_name_or_path, base_name(model) or type(model).__name__), None
    for part, known, own in zip(PARTS, expected, fingerprints(model, adapter_name, config), strict=True):
        if known and own:
            warning = compare_fingerprints("The adapter", part, known, own, bases) or warning
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
