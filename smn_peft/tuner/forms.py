# SPDX-License-Identifier: Apache-2.0
"""The layer types that can be masked, as a registry: Linear, convolutions, Embedding, attention and others."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..functional.effective import ConvGeometry, masked_conv, masked_linear
from .layer import MaskLayer
from .wrapper import Slot, call_with

__all__ = [
    "COMPILED",
    "CONVOLUTIONS",
    "DENSE",
    "MASKABLE",
    "Conv",
    "Embedding",
    "Linear",
    "LinearConv1D",
    "MultiheadAttention",
    "Substituted",
    "is_norm",
    "iter_layers",
    "mask_layer_for",
    "type_name",
]

#: What `torch.compile` wraps a module in.
COMPILED = "torch._dynamo.eval_frame.OptimizedModule"


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
        if (arguments := self.fused_arguments(names)) is None:
            return self.run(self.effective_tensors(names), input)
        weight, scores, bias, spec, trainable = arguments
        input, bias = _autocast(input, bias)
        return masked_linear(input, weight, scores, bias, spec, trainable)

    def run(self, tensors: Sequence[Tensor], input: Tensor) -> Tensor:
        """See [`MaskLayer.run`]."""
        return F.linear(input, *tensors)


class Conv(MaskLayer):
    """`nn.Conv1d/2d/3d` and their transposed forms, grouped or not, with any padding mode."""

    def masked_forward(self, names: Sequence[str], input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(batch, in_channels, …) -> (batch, out_channels, …), or without the batch dimension."""
        if (arguments := self.fused_arguments(names)) is None:
            return self.run(self.effective_tensors(names), input, output_size)
        weight, scores, bias, spec, trainable = arguments

        def convolve(x: Tensor, geometry: ConvGeometry) -> Tensor:
            x, shift = _autocast(x, bias)
            return masked_conv(x, weight, scores, shift, geometry, spec, trainable)

        return self._batched(convolve, input, output_size)

    def run(self, tensors: Sequence[Tensor], input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """See [`MaskLayer.run`]."""
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
        """The input, padded if the padding is not zeros, and what the convolution is."""
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

    def run(self, tensors: Sequence[Tensor], input: Tensor) -> Tensor:
        """(…) of indices -> (…, embedding_dim)."""
        base: Any = self.base_layer
        return F.embedding(
            input, tensors[0], base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq, sparse=base.sparse
        )


class LinearConv1D(MaskLayer):
    """transformers' `Conv1D`, a Linear whose weight is (in_features, out_features).

    PEFT's "all-linear" knows a wrapped linear layer by "Linear" in the name of its class.
    """

    def run(self, tensors: Sequence[Tensor], x: Tensor) -> Tensor:
        """(…, in_features) -> (…, out_features)."""
        weight, *bias = tensors
        return F.linear(x, weight.t(), *bias)


class Substituted(MaskLayer):
    """A layer that keeps its own forward (timm's convolutions that standardise their weight or pad as TensorFlow)."""

    def _masked(self, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        return self.masked_forward(names, *args, **kwargs)  # it calls the base layer, hooks and all

    def run(self, tensors: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        """Whatever the base layer's forward takes and gives."""
        return call_with(self.get_base_layer(), self._by_path(tensors), *args, **kwargs)


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


# --- Registry --------------------------------------------------------------------------------------------------------

# Exact types only: a subclass may have its own forward, which a masked layer would bypass in silence.
# Types of other libraries go by qualified name, so that nothing is imported to look them up.
MASKABLE: Mapping[type[nn.Module] | str, type[MaskLayer]] = {
    nn.Linear: Linear,
    nn.Conv1d: Conv,
    nn.Conv2d: Conv,
    nn.Conv3d: Conv,
    nn.ConvTranspose1d: Conv,
    nn.ConvTranspose2d: Conv,
    nn.ConvTranspose3d: Conv,
    nn.Embedding: Embedding,
    nn.MultiheadAttention: MultiheadAttention,
    "transformers.pytorch_utils.Conv1D": LinearConv1D,
    # Only its constructor differs from nn.Conv2d.
    "transformers.models.efficientnet.modeling_efficientnet.EfficientNetDepthwiseConv2d": Conv,
    "timm.layers.conv2d_same.Conv2dSame": Substituted,
    "timm.layers.std_conv.StdConv2d": Substituted,
    "timm.layers.std_conv.StdConv2dSame": Substituted,
    "timm.layers.std_conv.ScaledStdConv2d": Substituted,
    "timm.layers.std_conv.ScaledStdConv2dSame": Substituted,
}
CONVOLUTIONS = frozenset({Conv, Substituted})
DENSE = frozenset({Linear, LinearConv1D, MultiheadAttention})


def type_name(module: nn.Module) -> str:
    """The module's class as `package.module.Class`, the form of the string keys of MASKABLE."""
    cls = type(module)
    return f"{cls.__module__}.{cls.__qualname__}"


def mask_layer_for(module: nn.Module) -> type[MaskLayer] | None:
    """The masked form of a layer, by its exact type; None if there is none."""
    return MASKABLE.get(type(module)) or MASKABLE.get(type_name(module))


_NORMS = (
    nn.modules.batchnorm._NormBase,  # BatchNorm, SyncBatchNorm and InstanceNorm of every dimension
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
_NORM_NAME = re.compile(r"(?:Batch|Layer|Group|Instance|RMS|Rms|Response|Evo|Simple)Norm")


def is_norm(module: nn.Module) -> bool:
    """Whether the module normalises activations: torch's norms, timm's BatchNormAct2d, the RMSNorms of transformers.

    Classes outside torch go by name and must hold vectors only, so that blocks such as `PreNorm` do not count.
    """
    if isinstance(module, _NORMS):
        return True
    named = _NORM_NAME.search(type(module).__name__) is not None
    return named and all(parameter.squeeze().ndim <= 1 for parameter in module.parameters())


def iter_layers(model: nn.Module, *, parts: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, as `(name, module)`, a module before its parts, seeing through wrappers of PEFT and compile.

    A wrapped layer appears under the wrapper's name as the layer it wraps, a `modules_to_save` wrapper as the
    original module. `parts` lists the parts of maskable modules too: those of a MultiheadAttention belong to it.
    """
    yield from _walk("", model, set(), parts)


def _walk(name: str, module: nn.Module, seen: set[int], parts: bool) -> Iterator[tuple[str, nn.Module]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    if (inner := _wrapped_by(module)) is not None:
        yield from _walk(name, inner, seen, parts)
        return
    yield name, module
    if parts or mask_layer_for(module) is None:
        for child_name, child in module.named_children():
            yield from _walk(f"{name}.{child_name}" if name else child_name, child, seen, parts)


def _wrapped_by(module: nn.Module) -> nn.Module | None:
    if isinstance(module, BaseTunerLayer):
        return module._modules.get("base_layer")
    if isinstance(module, AuxiliaryTrainingWrapper):
        return module._modules.get("original_module")
    return module._modules.get("_orig_mod") if type_name(module) == COMPILED else None
