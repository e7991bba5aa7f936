# SPDX-License-Identifier: Apache-2.0
"""The layer types that can be masked, as a registry: Linear, convolutions, Embedding, attention and others."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..functional.effective import ConvGeometry, masked_conv, masked_linear
from .layer import MaskLayer, Trained
from .mixed import rows_in_force
from .wrapper import Slot, is_plain

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


def _autocast(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Cast as autocast would, before a fused node hides the operation from it."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return x, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), None if bias is None else bias.to(dtype)


class Linear(MaskLayer):
    """`nn.Linear` with a masked weight, and bias by option."""

    has_node = True

    def node(self, own: Trained, input: Tensor) -> Tensor:
        """(…, in_features) -> (…, out_features)."""
        input, bias = _autocast(input, own.bias)
        return masked_linear(input, own.weight, own.scores, bias, own.spec, own.trainable)

    def run_with(self, tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """See [`MaskLayer.run_with`]; without a module in between it takes 10 µs less."""
        base: Any = self._modules["base_layer"]
        if kwargs or not is_plain(base):
            return super().run_with(tensors, *args, **kwargs)
        return F.linear(args[0], tensors["weight"], tensors["bias"] if "bias" in tensors else base.bias)


class Conv(MaskLayer):
    """`nn.Conv1d/2d/3d` and their transposed forms, grouped or not, with any padding mode."""

    has_node = True

    def node(self, own: Trained, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(batch, in_channels, …) -> (batch, out_channels, …), or without the batch dimension."""
        base: Any = self._modules["base_layer"]
        dims, padding = len(base.kernel_size), base.padding
        output_padding: list[int] = [0] * dims
        x = input if input.dim() == dims + 2 else input.unsqueeze(0)
        if base.transposed:
            sizes = (base.stride, padding, base.kernel_size, dims, base.dilation)
            output_padding = base._output_padding(x, output_size, *sizes)
        elif base.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
            x, padding = F.pad(x, base._reversed_padding_repeated_twice, mode=mode), [0] * dims
        x, bias = _autocast(x, own.bias)
        geometry = ConvGeometry(base.stride, padding, base.dilation, base.transposed, output_padding, base.groups)
        out = masked_conv(x, own.weight, own.scores, bias, geometry, own.spec, own.trainable)
        return out if input.dim() == dims + 2 else out.squeeze(0)


class Embedding(MaskLayer):
    """`nn.Embedding` with a masked table; σ is that of the whole table."""


class LinearConv1D(MaskLayer):
    """transformers' `Conv1D`, a Linear whose weight is (in_features, out_features).

    PEFT's "all-linear" knows a wrapped linear layer by "Linear" in the name of its class.
    """


class Substituted(MaskLayer):
    """timm's convolutions that standardise their weight or pad as TensorFlow."""


class MultiheadAttention(MaskLayer):
    """`nn.MultiheadAttention`: the packed or separate input projections, and the output projection."""

    slots = (
        Slot("in_proj_", "in_proj_weight"),
        Slot("q_proj_", "q_proj_weight"),
        Slot("k_proj_", "k_proj_weight"),
        Slot("v_proj_", "v_proj_weight"),
        Slot("out_proj_", "out_proj.weight"),
        Slot("in_proj_bias_", "in_proj_bias", weight="in_proj_"),
        Slot("out_proj_bias_", "out_proj.bias", weight="out_proj_"),
    )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See [`AdapterLayer.forward`]; rows under different adapters are refused: its batch may be any dimension."""
        if rows_in_force(self) is not None:
            raise TypeError(
                "Mixed batches by `adapter_names` are not supported for nn.MultiheadAttention in a model that "
                "generates: run one batch per adapter, or exclude the attention with exclude_modules."
            )
        return super().forward(*args, **kwargs)


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
