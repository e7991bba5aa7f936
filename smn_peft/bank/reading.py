# SPDX-License-Identifier: Apache-2.0
"""From a stored adapter to a task over a given base: names matched, masks decoded, everything checked."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..functional.masking import seeded_generator, select_trainable
from ..functional.packing import packed_size
from ..storage.adapter_config import is_settings
from ..storage.adapter_file import BASE_PREFIX, coded_masks, widened
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
from .task import SPARSE_BELOW, BankStats, Task, TaskMask

__all__ = ["TaskReader", "task_from_tensors"]

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class TaskReader:
    """Tasks of a source over a base, decoded and checked when they are asked for. Safe from any thread.

    Within a budget of bytes they are kept, each for one version of its adapter, the least recently used out first;
    `pinned` ones count, and stay.
    """

    def __init__(self, source: TaskSource, live: LiveModel, budget: int, stats: BankStats) -> None:
        self._source, self._live, self._budget, self._stats = source, live, budget, stats
        self.pinned: set[str] = set()
        self.lock = threading.RLock()
        self._held: OrderedDict[str, tuple[object, Task]] = OrderedDict()
        self._digests: dict[tuple[str, torch.dtype], str] = {}
        self._unmasked: dict[object, list[str]] = {}

    def decode(self, name: str, stored: StoredAdapter) -> Task:
        """Make a task of an adapter; ValueError if it does not belong to the base."""
        task = task_from_tensors(name, stored.tensors, self._live, stored.config)
        self._check_base(task)
        return task

    def task(self, name: str) -> Task:
        """Return a task, decoded if it is not, perhaps by two threads at once; KeyError for an unknown name."""
        version, stats = self._source.version(name), self._stats
        with self.lock:
            held = self._held.get(name)
            if held is not None and held[0] == version:
                self._held.move_to_end(name)
                stats.hits += 1
                return held[1]
            stats.misses += 1
        task = self.decode(name, self._source.read(name)).in_one_block()
        with self.lock:
            self.drop(name)
            self._held[name] = version, task
            stats.resident_bytes += task.nbytes
            stats.resident += 1
            for other in [other for other in self._held if other not in self.pinned]:
                if stats.resident_bytes <= self._budget:
                    break
                self.drop(other)
                stats.evictions += 1
        return task

    def resident(self) -> list[str]:
        """Names of the tasks that are decoded, the least recently used first."""
        with self.lock:
            return list(self._held)

    def drop(self, name: str) -> None:
        """Let go of a task; one that comes in its place is pinned if it was."""
        with self.lock:
            if name in self._held:
                self._stats.resident_bytes -= self._held.pop(name)[1].nbytes
                self._stats.resident -= 1

    def forget(self, name: str) -> bool:
        """Let go of a name, and tell whether it was pinned."""
        with self.lock:
            self.drop(name)
            pinned = name in self.pinned
            self.pinned.discard(name)
            return pinned

    def clear(self) -> None:
        """Forget all."""
        with self.lock:
            for name in [*self._held, *self.pinned]:
                self.forget(name)

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
    name: str, tensors: Mapping[str, Tensor], live: LiveModel, config: Mapping[str, Any] | None = None
) -> Task:
    """Make a task of an adapter's tensors, by key of its file, masks bit-packed or coded.

    The base is a plain timm or transformers model, or a `Classifier` around one; the adapter may have been made on
    either, as long as the layers are the same. AdapterFileError if a mask is damaged, ValueError if there is none, a
    layer is not found in the base, or a size does not fit.
    """
    bare = {key.removeprefix(BASE_PREFIX): tensor for key, tensor in tensors.items()}
    return _Decoder(name, live, config or {}, bare).task()


class _Decoder:
    """One adapter over one base, which it is for the codec too (`Base`): checks it and makes a task of it."""

    def __init__(self, name: str, live: LiveModel, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
        self.name, self.live, self.config, self.tensors = name, live, config, tensors
        self.modules = dict(live.model.named_modules(remove_duplicate=False))
        self.heads = head_modules(live.model)  # by id
        self.coded = coded_masks(tensors)
        self.prefix = "" if self.coded is None else self.coded[0]  # which names in the blob lack
        names = [] if self.coded is None else [self.prefix + entry.name for entry in self.coded[1].entries]
        layers = sorted({path for path, leaf in map(_split, [*tensors, *names]) if _is_mask(leaf)})
        if not layers:
            raise ValueError(f"Task {name!r}: the adapter holds no mask. A bank takes adapters of MaskConfig.")
        self.old, self.new = self._prefixes(layers)

    def task(self) -> Task:
        masks: dict[str, TaskMask] = {}
        rest: dict[str, Tensor] = {}
        tensors = self.tensors if self.coded is None else self._decoded(self.coded[1])
        for key, tensor in tensors.items():
            path, leaf = _split(key)
            if not leaf.startswith("smn_"):
                rest[key] = tensor
            elif leaf.removeprefix("smn_") in _STATISTICS:
                rest[f"{self._renamed(path)}.{leaf.removeprefix('smn_')}"] = tensor
            elif not _is_mask(leaf):
                if not (leaf.endswith("scores") or is_settings(key)):
                    raise self._damaged(f"holds {key}, which no masked layer takes")
            else:
                parameter = self.live.first_names[self._located(key)[0]]
                if parameter in masks:
                    raise self._damaged(f"brings two masks of {parameter}")
                masks[parameter] = self._mask(key, parameter, tensor)
        brought = {self.live.first_names.get(key, key): tensor for key, tensor in self._plain_heads(rest).items()}
        self._check_tensors(brought)
        self._check_complete(masks, brought)
        return Task(self.name, masks, brought, self.config)

    def _mask(self, key: str, parameter: str, packed: Tensor) -> TaskMask:
        if parameter in self.live.tied:
            raise ValueError(
                f"Task {self.name!r} cannot be taken: {', '.join(self.live.tied[parameter])} are tied, and a mask on "
                "one would change the other in silence. Give each its own (layer.weight = "
                "nn.Parameter(layer.weight.clone())), and open the bank anew."
            )
        below = SPARSE_BELOW if parameter in self.live.scalable else 0.0
        numel, scaled = self.live.shapes[parameter].numel(), bool(self.config.get("scale", True))
        return TaskMask.from_packed(key, packed, numel, scaled=scaled, sparse_below=below)

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"Task {self.name!r} {what}: the adapter is damaged. Save it anew.")

    def _prefixes(self, layers: Sequence[str]) -> tuple[str, str]:
        """What the adapter's module paths begin with, and the base's instead."""
        first = layers[0]
        parts = first.split(".")
        taken = [".".join(parts[:count]) + "." for count in range(1, len(parts))]
        put = sorted({path.removesuffix(first) for path in self.modules if path.endswith(f".{first}")})
        for old, new in [("", ""), *((prefix, "") for prefix in taken), *(("", prefix) for prefix in put)]:
            if all(layer.startswith(old) and new + layer[len(old) :] in self.modules for layer in layers):
                return old, new
        raise ValueError(
            f"Task {self.name!r} masks {first}, which the bank's base does not have: see the base in its config."
        )

    def _renamed(self, path: str) -> str:
        return self.new + path.removeprefix(self.old)

    def _located(self, key: str) -> tuple[str, str]:
        """Name of the parameter that a mask belongs to, and its path from the layer."""
        path, leaf = _split(key)
        layer = self.live.model.get_submodule(path := self._renamed(path))
        form = mask_layer_for(layer)
        slots = {slot.mask_name: slot.path for slot in form.slots} if form is not None else {}
        if (name := f"{path}.{slots.get(leaf)}") not in self.live.shapes:
            raise ValueError(f"The base's {path} ({type(layer).__name__}) has nothing for a {leaf}.")
        return name, slots[leaf]

    def _decoded(self, blob: MaskBlob) -> dict[str, Tensor]:
        """The tensors, with masks as bits."""
        accelerate()  # a bank reads many masks
        for entry in blob.entries:
            numel = self.live.shapes[self._located(self.prefix + entry.name)[0]].numel()
            if entry.size != packed_size(numel):
                raise ValueError(
                    f"{self.prefix}{entry.name} is coded for {entry.size} bytes of bits, the base has {numel} weights "
                    "there: open the bank over the base that adapter_config.json names."
                )
        masks = decode_masks(blob, blob.size, self)
        rest = {key: tensor for key, tensor in self.tensors.items() if _split(key)[1] != BLOB_NAME}
        return rest | {self.prefix + name: torch.from_numpy(bits) for name, bits in masks.items()}

    def selected(self, name: str) -> NDArray[np.bool_] | None:
        fraction = self.config.get("trainable_fraction", 1.0)
        if fraction == 1.0:
            return None
        key = self.prefix + name
        parameter, path = self._located(key)
        generator = seeded_generator(self.config.get("seed", 0), f"{_split(key)[0]}.{path}.select")
        weight = self.live.values(parameter)
        return select_trainable(weight, fraction, self.config["select"], generator).reshape(-1).cpu().numpy()

    def _plain_heads(self, rest: dict[str, Tensor]) -> dict[str, Tensor]:
        """Widen heads; what standardises their input goes into weight and bias where the base has no place for it."""
        result = widened(rest) if self.config.get("save_dtype") == "int8" else dict(rest)
        for path in [key.removesuffix(".feature_mean") for key in rest if key.endswith(".feature_mean")]:
            if path not in self.modules or hasattr(self.modules[path], "feature_mean"):
                continue
            mean, std = (result.pop(f"{path}.{which}").double() for which in ("feature_mean", "feature_std"))
            weight, bias = (result[f"{path}.{which}"] for which in ("weight", "bias"))
            folded = weight.double() / std
            result[f"{path}.weight"] = folded.float()  # a file's narrow dtype could not hold them
            result[f"{path}.bias"] = (bias.double() - folded @ mean).float()
        return result

    def _check_complete(self, masks: Mapping[str, TaskMask], tensors: Mapping[str, Tensor]) -> None:
        """Refuse an adapter that brings a tensor twice, or not all that its config promises."""
        if twice := sorted(masks.keys() & tensors.keys()):
            raise self._damaged(f"masks {twice[0]} and brings it whole too, and only one can be")
        modules = dict(self.live.model.named_modules())
        for saved in self.config.get("modules_to_save") or ():
            paths = [path for path in modules if f".{path}".endswith(f".{saved}")]
            wanted = {f"{path}.{leaf}" for path in paths for leaf, _ in modules[path].named_parameters()}
            lacking = sorted(wanted - tensors.keys())
            if lacking or not (paths or any(f".{saved}." in f".{key}" for key in tensors)):
                raise self._damaged(f"lacks {[*lacking, saved][0]}, which its config promises in modules_to_save")
        if self.config.get("batch_norm") == "adapt":
            own = [path for path, norm in modules.items() if has_statistics(norm) and id(norm) not in self.heads]
            lacking = [key for path in own for leaf in _STATISTICS if (key := f"{path}.{leaf}") not in tensors]
            if lacking:
                raise self._damaged(f"lacks {lacking[0]}, and its config promises statistics (batch_norm='adapt')")

    def _check_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Check what a task brings along whole: of the base's shapes, but for a head's number of classes."""
        live, told = self.live, f"Task {self.name!r}"
        linears = {path: module for path, module in live.model.named_modules() if isinstance(module, nn.Linear)}
        heads = {path for path, module in linears.items() if "." not in path or id(module) in self.heads}
        heads.update([*linears][-1:])
        for key, tensor in tensors.items():
            if (own := live.shapes.get(key)) is None:
                raise ValueError(
                    f"{told} brings {key}, for which the base has no place. For a head, make the base with one: "
                    "timm.create_model(…, num_classes=1), or load_classifier(…)."
                )
            if own != tensor.shape:
                problem = f"{told}: {key} has shape {tuple(tensor.shape)}, the base {tuple(own)}"
                if own[1:] != tensor.shape[1:] or len(own) != tensor.dim():
                    raise ValueError(f"{problem}: open the bank over the base that the adapter was made on.")
                if _split(key)[0] not in heads:
                    raise ValueError(f"{problem}, and is no head, whose number of classes could be any.")
            if tensor.is_complex() or tensor.is_floating_point() != live.dtype(key).is_floating_point:
                raise self._damaged(f"has {key} in {tensor.dtype}, the base in {live.dtype(key)}")
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise self._damaged(f"has values in {key} that are not finite")
            if key.endswith((".running_var", ".num_batches_tracked")) and bool((tensor < 0).any()):
                raise self._damaged(f"has a negative {key}, which no statistic is")
        shapes = live.shapes | {key: tensor.shape for key, tensor in tensors.items()}
        for path in {_split(key)[0] for key in tensors} & heads:
            leaves = [leaf for leaf, _ in linears[path].named_parameters(recurse=False)]
            counts = {leaf: shapes[f"{path}.{leaf}"][0] for leaf in leaves}
            if len(set(counts.values())) > 1:
                found = " and ".join(f"a {leaf} of {count}" for leaf, count in counts.items())
                raise self._damaged(f"has a head {path} with {found} classes")


def _is_mask(leaf: str) -> bool:
    return leaf.startswith("smn_") and leaf.endswith("mask")


def _split(key: str) -> tuple[str, str]:
    path, _, leaf = key.rpartition(".")
    return path, leaf
