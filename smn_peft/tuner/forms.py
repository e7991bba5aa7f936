# SPDX-License-Identifier: Apache-2.0
"""The layer types that can be masked: Linear, convolutions, Embedding, transformers' Conv1D, attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional.effective import ConvGeometry, masked_conv, masked_linear
from .cache import Training
from .kinds import kind_of
from .layer import MaskLayer
from .slots import Slot
from .substitution import call_with

__all__ = ["Conv", "Embedding", "Linear", "LinearConv1D", "MultiheadAttention", "Substituted", "mask_layer_for"]


def _autocast(*tensors: Tensor | None) -> list[Any]:
    """Cast as autocast would, before a fused node hides the operation from it."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors]


class Linear(MaskLayer):
    """`nn.Linear` with a masked weight, and bias by option."""

    def masked_forward(self, names: Sequence[str], input: Tensor) -> Tensor:
        """(…, in_features) -> (…, out_features)."""
        training = self.alone(names)
        return self.run(self.effective_tensors(names), input) if training is None else self.train_on(training, input)

    def train_on(self, training: Training, input: Tensor) -> Tensor:
        """[`masked_forward`] as one autograd node."""
        input, bias = _autocast(input, training.bias)
        return masked_linear(input, training.weight, training.scores, bias, training.spec, training.trainable)

    def run(self, tensors: Sequence[Tensor], input: Tensor) -> Tensor:
        """See [`masked_forward`]; `tensors` are weight and bias."""
        return F.linear(input, *tensors)


class Conv(MaskLayer):
    """`nn.Conv1d/2d/3d` and their transposed forms, grouped or not, with any padding mode."""

    def masked_forward(self, names: Sequence[str], input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(batch, in_channels, …) -> (batch, out_channels, …), or without the batch dimension."""
        if (training := self.alone(names)) is None:
            return self.run(self.effective_tensors(names), input, output_size)
        return self.train_on(training, input, output_size)

    def train_on(self, training: Training, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """[`masked_forward`] as one autograd node."""
        weight, scores, spec, trainable = training.weight, training.scores, training.spec, training.trainable

        def convolve(x: Tensor, geometry: ConvGeometry) -> Tensor:
            x, bias = _autocast(x, training.bias)
            return masked_conv(x, weight, scores, bias, geometry, spec, trainable)

        return self._batched(convolve, input, output_size)

    def run(self, tensors: Sequence[Tensor], input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """See [`masked_forward`]; `tensors` are weight and bias."""
        weight, bias = tensors if len(tensors) == 2 else (tensors[0], None)

        def convolve(x: Tensor, geometry: ConvGeometry) -> Tensor:
            x, kernel, shift = _autocast(x, weight, bias)  # on a CPU it would leave `torch.convolution` alone
            return torch.convolution(x, kernel, shift, *geometry)

        return self._batched(convolve, input, output_size)

    def _batched(
        self, convolve: Callable[[Tensor, ConvGeometry], Tensor], input: Tensor, output_size: list[int] | None
    ) -> Tensor:
        base: Any = self.base_layer
        dims = len(base.kernel_size)
        if input.dim() == dims + 2:
            return convolve(*self._geometry(base, input, output_size, dims))
        return convolve(*self._geometry(base, input.unsqueeze(0), output_size, dims)).squeeze(0)

    @staticmethod
    def _geometry(base: Any, x: Tensor, output_size: list[int] | None, dims: int) -> tuple[Tensor, ConvGeometry]:
        if base.transposed:
            output_padding = base._output_padding(
                x, output_size, base.stride, base.padding, base.kernel_size, dims, base.dilation
            )
            return x, ConvGeometry(base.stride, base.padding, base.dilation, True, output_padding, base.groups)
        padding = base.padding
        if base.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
            x = F.pad(x, base._reversed_padding_repeated_twice, mode=mode)
            padding = [0] * dims
        return x, ConvGeometry(base.stride, padding, base.dilation, False, [0] * dims, base.groups)


class Embedding(MaskLayer):
    """`nn.Embedding` with a masked table; σ is that of the whole table."""

    slots = (Slot("", "weight"),)

    def masked_forward(self, names: Sequence[str], input: Tensor) -> Tensor:
        """(…) of indices -> (…, embedding_dim)."""
        return self.run(self.effective_tensors(names), input)

    def run(self, tensors: Sequence[Tensor], input: Tensor) -> Tensor:
        """See [`masked_forward`]; `tensors` is the table."""
        base: Any = self.base_layer
        return F.embedding(
            input, tensors[0], base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq, sparse=base.sparse
        )


class LinearConv1D(MaskLayer):
    """transformers' `Conv1D`, a Linear whose weight is (in_features, out_features).

    PEFT's "all-linear" knows a wrapped linear layer by "Linear" in the name of its class.
    """

    def masked_forward(self, names: Sequence[str], x: Tensor) -> Tensor:
        """(…, in_features) -> (…, out_features)."""
        return self.run(self.effective_tensors(names), x)

    def run(self, tensors: Sequence[Tensor], x: Tensor) -> Tensor:
        """See [`masked_forward`]; `tensors` are weight and bias."""
        weight, *bias = tensors
        return F.linear(x, weight.t(), *bias)


class Substituted(MaskLayer):
    """A layer with a forward of its own, run with the effective tensors in the place of the frozen ones.

    For timm's convolutions that standardise their weight or pad as TensorFlow does.
    """

    def _masked(self, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        return self.masked_forward(names, *args, **kwargs)  # it calls the base layer, hooks and all

    def masked_forward(self, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """Whatever the base layer's forward takes and gives."""
        return self.run(self.effective_tensors(names), *args, **kwargs)

    def run(self, tensors: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        """See [`masked_forward`]; `tensors` are those of `present_slots`."""
        paths = (slot.path for slot in self.present_slots)
        return call_with(self.get_base_layer(), dict(zip(paths, tensors, strict=True)), *args, **kwargs)


class MultiheadAttention(Substituted):
    """`nn.MultiheadAttention`: the packed or separate input projections, and the output projection."""

    slots = (
        Slot("in_proj_", "in_proj_weight"),
        Slot("q_proj_", "q_proj_weight"),
        Slot("k_proj_", "k_proj_weight"),
        Slot("v_proj_", "v_proj_weight"),
        Slot("out_proj_", "out_proj.weight"),
        Slot("in_proj_bias_", "in_proj_bias", is_bias=True),
        Slot("out_proj_bias_", "out_proj.bias", is_bias=True),
    )

    def _mixed(self, names: list[str], *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            "Mixed batches by `adapter_names` are not supported for nn.MultiheadAttention in a model that generates: "
            "run one batch per adapter, or exclude the attention with exclude_modules."
        )


def mask_layer_for(module: nn.Module) -> type[MaskLayer] | None:
    """The masked form of a layer, by its exact type; None if there is none.

    A subclass may have a forward of its own, which a masked form would bypass: it is never matched.
    """
    kind = kind_of(module)
    return None if kind is None else _FORMS[kind]


_FORMS: dict[str, type[MaskLayer]] = {
    "linear": Linear,
    "conv": Conv,
    "embedding": Embedding,
    "conv1d_transformers": LinearConv1D,
    "attention": MultiheadAttention,
    "substituted": Substituted,
}
