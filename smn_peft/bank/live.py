# SPDX-License-Identifier: Apache-2.0
"""`LiveModel`: a plain model in whose memory tasks take turns."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .live_tensor import LiveTensor
from .scaled_linear import ScaledLinear, scalable_weights
from .task import Task

__all__ = ["LiveModel"]


class LiveModel:
    """A model whose masked weights are rewritten in place, from task to task and back to the base.

    Attributes:
        model: The base, in eval mode.
        current: The task that the weights are of; None: the base's own.
        scalable: Names of the weights whose layer takes 1/σ on itself.
        generation: Counts switches; a result belongs to a task only if the counter did not move meanwhile.
    """

    def __init__(self, model: nn.Module) -> None:
        """Bind a model.

        Raises:
            ValueError: If adapters wrap the model already.
        """
        if any(hasattr(module, "base_layer") for module in model.modules()) or hasattr(model, "peft_config"):
            raise ValueError(
                "A bank takes the plain base model, and this one has PEFT adapters: pass model.unload(), or load the "
                "base anew."
            )
        self.model = model.eval()
        self.current: Task | None = None
        self.generation = 0
        self.scalable = scalable_weights(model)
        self._live: dict[str, LiveTensor] = {}
        self._linears: dict[str, ScaledLinear] = {}
        self._own: dict[str, Tensor] = {}
        self._touched: set[str] = set()

    def may_be_sparse(self, name: str) -> bool:
        """Whether a task may be held as indices at this parameter."""
        return name in self.scalable

    def switch(self, task: Task | None) -> None:
        """Make the model the task's, or the base's own again.

        A switch that fails, whatever the reason, leaves the base.

        Raises:
            RuntimeError: What the device raised, such as running out of memory.
        """
        if task is self.current and (task is not None or not (self._touched or self._own)):
            return
        self.generation += 1
        self.current = None
        try:
            self._leave(task)
            if task is not None:
                self._enter(task)
        except BaseException:
            self._leave(None)
            raise
        self.current = task

    def _leave(self, task: Task | None) -> None:
        """Undo what the next task does not overwrite."""
        masks = {} if task is None else task.masks
        for name in [name for name in self._touched if name not in masks]:
            self._live[name].restore()
            self._touched.discard(name)
            self._follow(name)
        kept = set() if task is None else task.tensors.keys()
        for name in [name for name in self._own if name not in kept]:
            _replace(self.model, name, self._own.pop(name))

    def _enter(self, task: Task) -> None:
        for name, mask in task.masks.items():
            live = self._bound(name)
            self._touched.add(name)
            live.apply(mask)
            self._follow(name)
        for name, tensor in task.tensors.items():
            own = _tensor(self.model, name)
            self._own.setdefault(name, own if isinstance(own, nn.Parameter) else own.clone())
            _replace(self.model, name, tensor.to(own.device, own.dtype))

    def _bound(self, name: str) -> LiveTensor:
        if name not in self._live:
            scalable = name in self.scalable
            live = self._live[name] = LiveTensor(self.model.get_parameter(name), scales_outside=scalable)
            if scalable:
                layer: Any = self.model.get_submodule(name.rpartition(".")[0])
                self._linears[name] = ScaledLinear(layer, live)
        return self._live[name]

    def _follow(self, name: str) -> None:
        if name in self._linears:
            self._linears[name].follow()

    def close(self) -> None:
        """Give the base back as it was, with its own forwards."""
        self.switch(None)
        for linear in self._linears.values():
            linear.remove()
        self._live.clear()
        self._linears.clear()

    @property
    def nbytes(self) -> int:
        """Bytes held to restore the base."""
        return sum(live.nbytes for live in self._live.values()) + sum(tensor.nbytes for tensor in self._own.values())


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), leaf)
    return tensor


def _replace(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Set a parameter or buffer: in place where the shapes agree and it is a buffer, else as another tensor."""
    path, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf].copy_(tensor)
        return
    module._parameters[leaf] = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)
    if isinstance(module, nn.Linear) and leaf == "weight":
        module.out_features, module.in_features = tensor.shape
