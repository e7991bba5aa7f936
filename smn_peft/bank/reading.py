# SPDX-License-Identifier: Apache-2.0
"""From a stored adapter to a task over a given base: names matched, masks decoded, everything checked."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..functional.masking import seeded_generator, select_trainable
from ..functional.packing import packed_size
from ..storage.adapter_config import is_settings
from ..storage.adapter_file import BASE_PREFIX, coded_masks
from ..storage.codec.blob import BLOB_NAME, MaskBlob, decode_masks
from ..storage.codec.layer import accelerate
from ..storage.fingerprint import PARTS, compare_fingerprints, fingerprint, tensor_digest
from ..tuner.batch_norm import has_statistics
from ..tuner.checks import base_name, unmasked_tensors
from ..tuner.forms import mask_layer_for
from ..tuner.targets import head_modules
from .live import LiveModel
from .source import BASE_NAME, StoredAdapter
from .store import TaskSource
from .task import SPARSE_BELOW, Task, TaskCache, TaskMask

__all__ = ["TaskReader", "task_from_tensors"]

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class TaskReader:
    """Tasks of a source over a base, decoded and checked when they are asked for. Safe from any thread."""

    def __init__(self, source: TaskSource, live: LiveModel, cache: TaskCache) -> None:
        self._source, self._live, self._cache = source, live, cache
        self._digests: dict[tuple[str, torch.dtype], str] = {}
        self._unmasked: dict[object, list[str]] = {}

    def decode(self, name: str, stored: StoredAdapter) -> Task:
        """Make a task of an adapter; ValueError if it does not belong to the base."""
        task = task_from_tensors(name, stored.tensors, self._live, stored.config)
        self._check_base(task)
        return task

    def task(self, name: str) -> Task:
        """Return a task, decoded if it is not; KeyError for an unknown name."""
        version = self._source.version(name)
        return self._cache.get(name, version, lambda: self.decode(name, self._source.read(name)))

    def __call__(self, task: str | Task | None) -> Task | None:
        """Return a task by its name, or as it was looked up before; None for the base."""
        if task is None or task == BASE_NAME:
            return None
        return self.task(task) if isinstance(task, str) else task

    def _check_base(self, task: Task) -> None:
        """Refuse a task of another base by its fingerprints; its adapter's ``check_base=False`` overrides."""
        if not task.info.get("check_base", True):
            return
        masked, rest = (task.info.get(f"{part}_fingerprint") for part in ("base", "unmasked"))
        if masked is not None:
            self._compare(task, PARTS[0], str(masked), list(task.masks))
        if rest is not None:
            key = (frozenset(task.masks), task.info.get("batch_norm"), tuple(task.info.get("modules_to_save") or ()))
            if key not in self._unmasked:
                self._unmasked[key] = list(unmasked_tensors(self._live.model, task.masks.keys(), task.info))
            self._compare(task, PARTS[1], str(rest), self._unmasked[key])

    def _compare(self, task: Task, part: str, expected: str, names: list[str]) -> None:
        base = self._live.model
        wanted = [(name, self._live.dtype(name)) for name in names]
        for name, dtype in wanted:
            if (name, dtype) not in self._digests:
                self._digests[name, dtype] = tensor_digest(self._live.values(name))
        present = fingerprint((self._digests[key] for key in wanted), wanted[0][1] if wanted else torch.float32)
        bases = task.info.get("base_model_name_or_path"), base_name(base) or type(base).__name__
        if warning := compare_fingerprints(f"Task {task.name!r}", part, expected, present, bases):
            warnings.warn(warning, stacklevel=5)


def task_from_tensors(
    name: str,
    tensors: Mapping[str, Tensor],
    live: LiveModel,
    config: Mapping[str, Any] | None = None,
) -> Task:
    """Make a task of an adapter's tensors, by key of its file, masks bit-packed or coded.

    The base is a plain timm or transformers model, or a `Classifier` around one; the adapter may have been made on
    either, as long as the layers are the same. AdapterFileError if a mask is damaged, ValueError if there is none, a
    layer is not found in the base, or a size does not fit.
    """
    config, base = config or {}, live.model
    bare = {key.removeprefix(BASE_PREFIX): tensor for key, tensor in tensors.items()}
    coded = coded_masks(bare)
    prefix, names = ("", []) if coded is None else (coded[0], [entry.name for entry in coded[1].entries])
    layers = {path for path, leaf in map(_split, [*bare, *(prefix + name for name in names)]) if _is_mask(leaf)}
    if not layers:
        raise ValueError(f"Task {name!r}: the adapter holds no mask. A bank takes adapters of MaskConfig.")
    rename = _renaming(name, layers, base)

    def locate(key: str) -> tuple[str, str]:
        path, leaf = _split(key)
        return _parameter(live, rename(path), leaf)

    if coded is not None:
        bare = {key: tensor for key, tensor in bare.items() if _split(key)[1] != BLOB_NAME}
        bare |= _Base(live, prefix, locate, config).decode(coded[1])
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
                raise _damaged(name, f"holds {key}, which no masked layer takes")
        else:
            parameter = live.first_name(locate(key)[0])
            if parameter in masks:
                raise _damaged(name, f"brings two masks of {parameter}")
            if parameter in live.tied:
                raise ValueError(
                    f"Task {name!r} cannot be taken: {', '.join(live.tied[parameter])} are tied, and a mask on one "
                    "would change the other in silence. Give each its own (layer.weight = "
                    "nn.Parameter(layer.weight.clone())), and open the bank anew."
                )
            below = SPARSE_BELOW if parameter in live.scalable else 0.0
            numel, scaled = live.shapes[parameter].numel(), bool(config.get("scale", True))
            masks[parameter] = TaskMask.from_packed(key, tensor, numel, scaled=scaled, sparse_below=below)
    brought = {live.first_name(key): tensor for key, tensor in _plain_heads(rest, base).items()}
    _check_tensors(name, brought, live)
    _check_complete(name, masks, brought, config, base)
    return Task(name, masks, brought, config)


def _damaged(name: str, what: str) -> ValueError:
    return ValueError(f"Task {name!r} {what}: the adapter is damaged. Save it anew.")


def _is_mask(leaf: str) -> bool:
    return leaf.startswith("smn_") and leaf.endswith("mask")


def _split(key: str) -> tuple[str, str]:
    path, _, leaf = key.rpartition(".")
    return path, leaf


def _parameter(live: LiveModel, path: str, leaf: str) -> tuple[str, str]:
    """Name of the parameter that a mask belongs to, and its path from the layer."""
    layer = live.model.get_submodule(path)
    form = mask_layer_for(layer)
    slots = {slot.mask_name: slot.path for slot in form.slots} if form is not None else {}
    if (name := f"{path}.{slots.get(leaf)}") not in live.shapes:
        raise ValueError(f"The base's {path} ({type(layer).__name__}) has nothing for a {leaf}.")
    return name, slots[leaf]


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
    raise ValueError(f"Task {name!r} masks {first}, which the bank's base does not have: see the base in its config.")


def _plain_heads(rest: dict[str, Tensor], base: nn.Module) -> dict[str, Tensor]:
    """Fold a head's standardisation into its weight and bias, where the base's own head has no place for it."""
    result, modules = dict(rest), dict(base.named_modules(remove_duplicate=False))
    for path in [key.removesuffix(".feature_mean") for key in rest if key.endswith(".feature_mean")]:
        if path not in modules or hasattr(modules[path], "feature_mean"):
            continue
        mean, std = (result.pop(f"{path}.{which}").double() for which in ("feature_mean", "feature_std"))
        weight, bias = (result[f"{path}.{which}"] for which in ("weight", "bias"))
        folded = weight.double() / std
        result[f"{path}.weight"] = folded.to(weight.dtype)
        result[f"{path}.bias"] = (bias.double() - folded @ mean).to(bias.dtype)
    return result


def _check_complete(
    name: str, masks: Mapping[str, TaskMask], tensors: Mapping[str, Tensor], config: Mapping[str, Any], base: nn.Module
) -> None:
    """Refuse an adapter that brings a tensor twice, or not all that its config promises."""
    if twice := sorted(masks.keys() & tensors.keys()):
        raise _damaged(name, f"masks {twice[0]} and brings it whole too, and only one can be")
    modules = dict(base.named_modules())
    for saved in config.get("modules_to_save") or ():
        paths = [path for path in modules if path == saved or path.endswith(f".{saved}")]
        wanted = {f"{path}.{leaf}" for path in paths for leaf, _ in modules[path].named_parameters()}
        lacking = sorted(wanted - tensors.keys())
        if lacking or not (paths or any(f".{saved}." in f".{key}" for key in tensors)):
            promised = lacking[0] if lacking else saved
            raise _damaged(name, f"lacks {promised}, which its config promises in modules_to_save")
    if config.get("batch_norm") == "adapt":
        heads = head_modules(base)
        own = [path for path, module in modules.items() if has_statistics(module) and id(module) not in heads]
        lacking = [f"{path}.{leaf}" for path in own for leaf in _STATISTICS if f"{path}.{leaf}" not in tensors]
        if lacking:
            raise _damaged(name, f"lacks {lacking[0]}, and its config promises statistics (batch_norm='adapt')")


def _check_tensors(name: str, tensors: dict[str, Tensor], live: LiveModel) -> None:
    """Check what a task brings along whole: of the base's shapes, but for a head's number of classes."""
    base = live.model
    linears = {path: module for path, module in base.named_modules() if isinstance(module, nn.Linear)}
    inside = head_modules(base)
    heads = {path for path, module in linears.items() if "." not in path or id(module) in inside}
    heads.update([*linears][-1:])
    for key, tensor in tensors.items():
        if key not in live.shapes:
            raise ValueError(
                f"Task {name!r} brings {key}, for which the base has no place. For a head, make the base with one: "
                "timm.create_model(…, num_classes=1), or load_classifier(…)."
            )
        own = live.shapes[key]
        if own[1:] != tensor.shape[1:] or len(own) != tensor.dim():
            raise ValueError(f"Task {name!r}: {key} has shape {tuple(tensor.shape)}, the base {tuple(own)}.")
        if own != tensor.shape and _split(key)[0] not in heads:
            raise ValueError(
                f"Task {name!r}: {key} has shape {tuple(tensor.shape)}, the base {tuple(own)}, and is no head, whose "
                "number of classes could be any: open the bank over the base that the adapter was made on."
            )
        if tensor.is_complex() or tensor.is_floating_point() != live.dtype(key).is_floating_point:
            raise _damaged(name, f"has {key} in {tensor.dtype}, the base in {live.dtype(key)}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise _damaged(name, f"has values in {key} that are not finite")
        if key.endswith((".running_var", ".num_batches_tracked")) and bool((tensor < 0).any()):
            raise _damaged(name, f"has a negative {key}, which no statistic is")
    for path in {_split(key)[0] for key in tensors} & heads:
        rows = {
            leaf: len(tensors[key]) if (key := f"{path}.{leaf}") in tensors else live.shapes[key][0]
            for leaf, own in base.get_submodule(path).named_parameters(recurse=False)
        }
        if len(set(rows.values())) > 1:
            told = " and ".join(f"a {leaf} of {count}" for leaf, count in rows.items())
            raise _damaged(name, f"has a head {path} with {told} classes")


# --- Coded masks -----------------------------------------------------------------------------------------------------


_accelerate_once = functools.cache(accelerate)
"""Read by compiled code where numba is installed: a bank reads many masks."""


@dataclass(frozen=True)
class _Base:
    """The base as the codec asks for it: by names in a blob, which lack the `prefix` of the adapter's keys."""

    live: LiveModel
    prefix: str
    locate: Callable[[str], tuple[str, str]]
    config: Mapping[str, Any]

    def decode(self, blob: MaskBlob) -> dict[str, Tensor]:
        """Masks as bits, by key."""
        _accelerate_once()
        for entry in blob.entries:
            numel = self.live.shapes[self.locate(self.prefix + entry.name)[0]].numel()
            if entry.size != packed_size(numel):
                raise ValueError(
                    f"{self.prefix}{entry.name} is coded for {entry.size} bytes of bits, the base has {numel} weights "
                    "there: open the bank over the base that adapter_config.json names."
                )
        masks = decode_masks(blob, blob.size, self)
        return {self.prefix + name: torch.from_numpy(bits) for name, bits in masks.items()}

    def selected(self, name: str) -> NDArray[np.bool_] | None:
        fraction = self.config.get("trainable_fraction", 1.0)
        if fraction == 1.0:
            return None
        parameter, path = self.locate(self.prefix + name)
        layer = (self.prefix + name).rpartition(".")[0]
        generator = seeded_generator(self.config.get("seed", 0), f"{layer}.{path}.select")
        weight = self.live.values(parameter)
        return select_trainable(weight, fraction, self.config["select"], generator).reshape(-1).cpu().numpy()
