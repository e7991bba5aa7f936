# SPDX-License-Identifier: Apache-2.0
"""Several processes in one run: accelerate's setup, a common start and end, BatchNorm over the joined batch."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    broadcast,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..functional.distributed import is_sharded, joined_batch_norm, process_count, unsharded
from .arguments import LoopArguments
from .checkpoint import checkpoint_name

T = TypeVar("T")
K = TypeVar("K")
_ENDS = "Another process cannot go on, so this one ends too."
# Digests among a run's facts, and what they are of.
_ALIKE = {
    "base": "weights of the base",
    "data": "training images",
    "indices": "numbers of images",
    "start": "scores to start from",
    "teacher": "weights of the fine-tuned model",
}


def build_accelerator(arguments: LoopArguments) -> Accelerator:
    """Create the accelerator of a run: plain, under DDP or under FSDP2.

    Raises:
        ValueError: If several processes would each train alone, into one folder, or under another engine than asked.
    """
    accelerator = Accelerator(
        cpu=arguments.cpu,
        mixed_precision=arguments.mixed_precision,
        gradient_accumulation_steps=arguments.accumulate,
        log_with=arguments.log_with,
        project_dir=arguments.output_dir,
        # Statistics are per adapter and synchronised where they are computed; frozen ones never differ.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    started, there = os.environ.get("WORLD_SIZE", "1"), accelerator.num_processes
    if started != str(there):
        found = f"{started} processes were started (WORLD_SIZE), but accelerate has {there} on {accelerator.device}"
        raise ValueError(f"{found}: pass --cpu (cpu=True), or unset WORLD_SIZE if this is the only process.")
    check_engine(accelerator, arguments)
    return accelerator


def check_engine(accelerator: Accelerator, arguments: LoopArguments) -> None:
    """Refuse engines of accelerate that cannot train a task, with ValueError, and set FSDP2 up for one."""
    asked = {
        name for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM") if os.environ.get(f"ACCELERATE_USE_{name}") == "true"
    }
    if asked == {"FSDP"} and not is_sharding(accelerator):
        fix = "leave --use_fsdp out, or a --config_file that names it"
        raise ValueError(f"FSDP was asked for, and accelerate has none on {accelerator.device}: {fix}.")
    plugin: Any = accelerator.state.fsdp_plugin if is_sharding(accelerator) else None
    if asked - {"FSDP"} or (plugin is not None and getattr(plugin, "fsdp_version", 1) != 2):
        engine = "FSDP1" if plugin is not None else " and ".join(sorted(asked))
        raise ValueError(f"smn_peft does not train under {engine}: use FSDP2, by --use_fsdp --fsdp_version 2.")
    if plugin is None:
        return
    for name, value in {"score_dtype": "float32", "compile": False, "channels_last": False}.items():
        if getattr(arguments, name) != value:
            raise ValueError(f"{name}={getattr(arguments, name)!r} does not go with FSDP2: leave it out.")
    # Every process loads the base, and buffers would not come along; under autocast scores stay as wide as they are.
    plugin.cpu_ram_efficient_loading, plugin.mixed_precision_policy = False, None


def is_sharding(accelerator: Accelerator) -> bool:
    """Whether the run is under FSDP2."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def on_main_process(accelerator: Accelerator, tensors: Mapping[K, Any]) -> dict[K, Any]:
    """Tensors with the sharded ones gathered, by all processes, on the main one's CPU; the others leave these out."""
    found: dict[K, Any] = {}
    for name, tensor in tensors.items():
        if not is_sharded(tensor):
            found[name] = tensor
            continue
        gathered = unsharded(tensor.detach())
        if accelerator.is_main_process:
            found[name] = gathered.cpu()
    return found


def reshard(module: nn.Module) -> None:
    """Free what a forward without a backward left gathered under FSDP2, so that nobody writes to a copy."""
    part: Any
    for part in module.modules():
        if hasattr(type(part), "reshard"):
            part.reshard()


def together(accelerator: Accelerator, act: Callable[[], T]) -> T:
    """Call `act`, which waits for no other process, on every process, and raise on all of them if it fails on one.

    RuntimeError, with that process's message, if it failed on another process only.
    """
    if accelerator.num_processes == 1:
        return act()
    problem: Exception | None = None
    try:
        result = act()
    except Exception as error:  # of any kind: the other processes have to learn of it
        problem = error
    failures = gather_object([] if problem is None else [f"{_name(accelerator)}: {problem}"])
    if problem is not None:
        raise problem
    if failures:
        raise RuntimeError(f"{_ENDS} {failures[0]}")
    return result


def decided(act: Callable[[], T]) -> T:
    """What `act` gives on the main process, on every process; the others do not call it, and fail where it fails."""
    state = PartialState()
    if state.num_processes == 1:
        return act()
    problem: Exception | None = None
    found: list[Any] = [None, None]
    try:
        found[0] = act() if state.is_main_process else None
    except Exception as error:
        problem, found[1] = error, str(error)
    result, message = broadcast_object_list(found)
    if problem is not None:
        raise problem
    if message is not None:
        raise RuntimeError(f"{_ENDS} {message}")
    return result


def agree_on_start(accelerator: Accelerator, checkpoint: Path | None, facts: Mapping[str, Any]) -> Path | None:
    """The main process's checkpoint to go on from, which every other has too, or none; of all else they have the same.

    ValueError, on every process, that names the folders or what differs.
    """
    mine = {"who": _name(accelerator), "from": checkpoint_name(checkpoint), "path": checkpoint, **facts}
    main: dict[str, Any] = decided(lambda: mine)

    def compare() -> None:
        if mine["from"] not in (main["from"], None):
            here, there = (Path(each["output_dir"]).absolute() for each in (mine, main))
            fix = "delete what is left of another run, or put output_dir on a disk that all share"
            starts = f"{main['who']} starts from {main['from'] or 'no checkpoint'} in {there}"
            raise ValueError(f"{starts}, and {mine['who']} has {mine['from']} in {here}: {fix}.")
        for name, what in _ALIKE.items():
            if mine.get(name) != main.get(name):
                raise ValueError(f"{mine['who']} reads other {what} than {main['who']}: copy them to every machine.")

    together(accelerator, compare)
    found: Path | None = main["path"]
    return found


def sent_tensors(accelerator: Accelerator, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The main process's tensors by name, on every process: on the CPU, in C order."""
    if accelerator.num_processes == 1:
        return dict(tensors)
    names = decided(lambda: {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
    result = {}
    for name, (shape, dtype) in names.items():
        own = tensors[name].contiguous() if accelerator.is_main_process else torch.empty(shape, dtype=dtype)
        data = own.reshape(-1).view(torch.uint8).to(accelerator.device)  # gloo sends few dtypes
        result[name] = broadcast(data).cpu().view(dtype).reshape(shape) if data.numel() else own
    return result


def _name(accelerator: Accelerator) -> str:
    return f"process {accelerator.process_index} on {platform.node() or 'this machine'}"


class SynchronisedBatchNorm(_BatchNorm):
    """BatchNorm over the joined batch on any device, followed by the activation of timm's BatchNorms if there is one.

    `nn.SyncBatchNorm` refuses the CPU.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"BatchNorm takes (batch, channels, …), got {tuple(input.shape)}.")

    def forward(self, input: Tensor) -> Tensor:
        """(batch, channels, …) -> the same, normalised by the joined batch in train mode."""
        x = self._joined(input) if self.training and process_count() > 1 else super().forward(input)
        for name in ("drop", "act"):
            layer = self._modules.get(name)
            x = x if layer is None else layer(x)
        return x

    def _joined(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        momentum = self.momentum or 0.0
        mean, var = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        return joined_batch_norm(x, mean, var, self.weight, self.bias, momentum, self.eps)


def synchronise_batch_norm(module: nn.Module) -> nn.Module:
    """Make every BatchNorm of a module normalise by the joined batch in train mode, in place.

    Only the class of each BatchNorm changes: to [`SynchronisedBatchNorm`] on the CPU, on a GPU to timm's subclass of
    torch's own, which is faster there. State dict, hooks and references stay valid. TypeError for a BatchNorm whose
    class has a forward of its own.
    """
    from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct

    kinds = (_BatchNorm, nn.SyncBatchNorm, BatchNormAct2d, SyncBatchNormAct, SynchronisedBatchNorm)
    known = {kind.forward for kind in kinds}
    norms: dict[str, Any] = {name: norm for name, norm in module.named_modules() if isinstance(norm, _BatchNorm)}
    for name, norm in norms.items():
        if type(norm).forward not in known or nn.parameter.is_lazy(norm.weight):
            what = f"{name or 'The module'} is a {type(norm).__name__}, which cannot be synchronised over processes"
            fix = "use nn.BatchNorm (after its first forward if lazy), or sync_batch_norm=False with frozen statistics"
            raise TypeError(f"{what}: {fix}.")
    for norm in norms.values():
        tensors = [tensor for tensor in (norm.weight, norm.running_mean) if tensor is not None]
        norm.__class__ = SyncBatchNormAct if tensors and tensors[0].is_cuda else SynchronisedBatchNorm
        norm.process_group = getattr(norm, "process_group", None)
    return module
