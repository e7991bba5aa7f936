# SPDX-License-Identifier: Apache-2.0
"""From an adapter's tensors to a task over a given base: names matched, sizes checked, the head made plain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..storage import is_settings
from ..storage.codec import BLOB_NAME
from ..tuner.batch_norm import has_statistics
from ..tuner.forms import mask_layer_for
from ..tuner.targets import head_modules
from .live import LiveModel
from .task import SPARSE_BELOW, Task, TaskMask
from .unpacking import blob_in, decode_blob

__all__ = ["task_from_tensors"]

_PREFIX = "base_model.model."
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def task_from_tensors(
    name: str,
    tensors: Mapping[str, Tensor],
    live: LiveModel,
    config: Mapping[str, Any] | None = None,
    config_nbytes: int = 0,
) -> Task:
    """Lay an adapter's tensors over a base.

    Args:
        name: Of the task.
        tensors: By key of the adapter file, masks bit-packed or coded.
        live: Of the base: a plain timm or transformers model, or a `Classifier` around one; the adapter may have been
            made on either, as long as the layers are the same.
        config: The adapter's; kept with the task.
        config_nbytes: Bytes that it takes for this task alone.

    Raises:
        AdapterFileError: If a mask is damaged.
        TypeError: If a mask is not uint8.
        ValueError: If there is no mask, a layer is not found in the base, or a size does not fit.
    """
    config, base = config or {}, live.model
    bare = {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}
    coded = blob_in(bare)
    prefix, names = ("", []) if coded is None else (coded[0], [entry.name for entry in coded[1].entries])
    layers = {path for path, leaf in map(_split, [*bare, *(prefix + name for name in names)]) if _is_mask(leaf)}
    if not layers:
        raise ValueError(f"Task {name!r}: the adapter holds no mask. A bank takes adapters of MaskConfig.")
    rename = _renaming(name, layers, base)

    def locate(key: str) -> tuple[str, str]:
        path, leaf = _split(key)
        return _parameter(base, rename(path), leaf)

    if coded is not None:
        bare = {key: tensor for key, tensor in bare.items() if _split(key)[1] != BLOB_NAME}
        bare |= decode_blob(*coded, live, locate, config)
    masks: dict[str, TaskMask] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in bare.items():
        path, leaf = _split(key)
        if not leaf.startswith("smn_"):
            rest[key] = tensor
        elif leaf.removeprefix("smn_") in _STATISTICS:
            rest[f"{rename(path)}.{leaf.removeprefix('smn_')}"] = tensor
        elif not _is_mask(leaf):
            if not (leaf.endswith("scores") or is_settings(key)):
                raise ValueError(f"Task {name!r} holds {key}, which no masked layer takes: the adapter is damaged.")
        else:
            parameter = live.first_name(locate(key)[0])
            if parameter in masks:
                raise ValueError(f"Task {name!r} brings two masks of {parameter}: the adapter is damaged.")
            below = SPARSE_BELOW if live.may_be_sparse(parameter) else 0.0
            numel = live.shape(parameter).numel()
            scaled = bool(config.get("scale", True))
            try:
                live.check_alone(parameter)
            except ValueError as error:
                raise ValueError(f"Task {name!r} cannot be taken: {error}") from error
            masks[parameter] = TaskMask.from_packed(key, tensor, numel, scaled=scaled, sparse_below=below)
    brought = {live.first_name(key): tensor for key, tensor in _plain_heads(rest, base).items()}
    brought = _checked(name, brought, live)
    _check_whole(name, masks, brought, config, base)
    return Task(name, masks, brought, config, config_nbytes)


def _is_mask(leaf: str) -> bool:
    return leaf.startswith("smn_") and leaf.endswith("mask")


def _split(key: str) -> tuple[str, str]:
    path, _, leaf = key.rpartition(".")
    return path, leaf


def _parameter(base: nn.Module, path: str, leaf: str) -> tuple[str, str]:
    """Name of the parameter that a mask belongs to, and its path from the layer."""
    form = mask_layer_for(base.get_submodule(path))
    slots = {slot.mask_name: slot.path for slot in form.slots} if form is not None else {}
    if leaf not in slots:
        raise ValueError(f"The base's {path} ({type(base.get_submodule(path)).__name__}) has nothing for a {leaf}.")
    return f"{path}.{slots[leaf]}", slots[leaf]


def _renaming(name: str, layers: Iterable[str], base: nn.Module) -> Callable[[str], str]:
    """How the adapter's module paths read in the base: with a prefix taken off, or put before."""
    modules = dict(base.named_modules(remove_duplicate=False))
    layers = sorted(layers)
    first = layers[0]
    parts = first.split(".")
    taken = [".".join(parts[:count]) + "." for count in range(1, len(parts))]
    put = sorted({path.removesuffix(first) for path in modules if path.endswith(f".{first}")})
    for old, new in [("", ""), *((prefix, "") for prefix in taken), *(("", prefix) for prefix in put)]:
        if all(layer.startswith(old) and new + layer[len(old) :] in modules for layer in layers):
            return lambda path: new + path.removeprefix(old)  # it returns at once
    raise ValueError(
        f"Task {name!r} masks {first}, which the bank's base does not have: its config names the base that it belongs "
        "to."
    )


def _plain_heads(rest: dict[str, Tensor], base: nn.Module) -> dict[str, Tensor]:
    """Fold a head's standardisation into its weight and bias, where the base's own head has no place for it."""
    result = dict(rest)
    for key in [key for key in rest if key.endswith(".feature_mean")]:
        path = key.removesuffix(".feature_mean")
        module = _module(base, path)
        if module is None or hasattr(module, "feature_mean"):
            continue
        mean, std = (result.pop(f"{path}.{which}").double() for which in ("feature_mean", "feature_std"))
        weight, bias = (result[f"{path}.{which}"] for which in ("weight", "bias"))
        folded = weight.double() / std
        result[f"{path}.weight"] = folded.to(weight.dtype)
        result[f"{path}.bias"] = (bias.double() - folded @ mean).to(bias.dtype)
    return result


def _module(base: nn.Module, path: str) -> nn.Module | None:
    try:
        return base.get_submodule(path)
    except AttributeError:
        return None


def _check_whole(
    name: str, masks: Mapping[str, TaskMask], tensors: Mapping[str, Tensor], config: Mapping[str, Any], base: nn.Module
) -> None:
    """Refuse an adapter that brings a tensor twice, or not all that its config promises.

    Raises:
        ValueError: Names what is too much or missing.
    """
    if twice := sorted(masks.keys() & tensors.keys()):
        raise ValueError(
            f"Task {name!r} masks {twice[0]} and brings it whole too, and only one can be: the adapter is damaged."
        )
    modules = dict(base.named_modules())
    for saved in config.get("modules_to_save") or ():
        paths = [path for path in modules if path == saved or path.endswith(f".{saved}")]
        wanted = {f"{path}.{leaf}" for path in paths for leaf, _ in modules[path].named_parameters()}
        lacking = sorted(wanted - tensors.keys())
        if lacking or not (paths or any(f".{saved}." in f".{key}" for key in tensors)):
            raise ValueError(
                f"Task {name!r} lacks {lacking[0] if lacking else saved}, which its config promises in "
                "modules_to_save: the adapter is damaged. Save it anew."
            )
    if config.get("batch_norm") == "adapt":
        heads = head_modules(base)
        own = [path for path, module in modules.items() if has_statistics(module) and id(module) not in heads]
        lacking = [f"{path}.{leaf}" for path in own for leaf in _STATISTICS if f"{path}.{leaf}" not in tensors]
        if lacking:
            raise ValueError(
                f"Task {name!r} lacks {lacking[0]}, and its config promises statistics of its own "
                "(batch_norm='adapt'): the adapter is damaged. Save it anew."
            )


def _checked(name: str, tensors: dict[str, Tensor], live: LiveModel) -> dict[str, Tensor]:
    """What a task brings along whole: each with the base's shape, but for a head's number of classes."""
    base = live.model
    heads = _heads(base)
    for key, tensor in tensors.items():
        try:
            own = live.shape(key)
        except AttributeError:
            raise ValueError(
                f"Task {name!r} brings {key}, for which the base has no place. For a head, make the base with one: "
                f"timm.create_model(…, num_classes=1), or load_classifier(…)."
            ) from None
        if own[1:] != tensor.shape[1:] or len(own) != tensor.dim():
            raise ValueError(f"Task {name!r}: {key} has shape {tuple(tensor.shape)}, the base {tuple(own)}.")
        if own != tensor.shape and _split(key)[0] not in heads:
            raise ValueError(
                f"Task {name!r}: {key} has shape {tuple(tensor.shape)}, the base {tuple(own)}, and is no head, whose "
                "number of classes could be any: open the bank over the base that the adapter was made on."
            )
        if tensor.is_complex() or tensor.is_floating_point() != live.dtype(key).is_floating_point:
            raise ValueError(f"Task {name!r}: {key} is {tensor.dtype}, the base {live.dtype(key)}: it is damaged.")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"Task {name!r}: {key} holds values that are not finite: the adapter is damaged.")
        if key.endswith((".running_var", ".num_batches_tracked")) and bool((tensor < 0).any()):
            raise ValueError(f"Task {name!r}: {key} is negative, which no statistic is: the adapter is damaged.")
    for path in {_split(key)[0] for key in tensors} & heads:
        rows = {
            leaf: len(tensors[key]) if (key := f"{path}.{leaf}") in tensors else live.shape(key)[0]
            for leaf, own in base.get_submodule(path).named_parameters(recurse=False)
        }
        if len(set(rows.values())) > 1:
            told = " and ".join(f"a {leaf} of {count}" for leaf, count in rows.items())
            raise ValueError(f"Task {name!r}: its head {path} would have {told} classes: the adapter is damaged.")
    return tensors


def _heads(base: nn.Module) -> set[str]:
    """Paths of the Linear layers that may be a head: those at the top, the last of all, and what timm says."""
    linears = {path: module for path, module in base.named_modules() if isinstance(module, nn.Linear)}
    get_classifier: Any = getattr(base, "get_classifier", tuple)
    found = get_classifier()
    named = [found] if isinstance(found, nn.Module) else [module for module in found if isinstance(module, nn.Module)]
    inside = {id(module) for classifier in named for module in classifier.modules()}
    return {path for path, module in linears.items() if "." not in path or id(module) in inside} | {
        *list(linears)[-1:]
    }
