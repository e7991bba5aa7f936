# SPDX-License-Identifier: Apache-2.0
"""Which module types can be masked, which are norms, and how to walk a model that adapters may already wrap."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

__all__ = [
    "COMPILED",
    "CONVOLUTIONS",
    "MASKABLE",
    "READERS",
    "is_norm",
    "iter_layers",
    "kind_of",
    "sizes_of",
    "type_name",
    "wrapped_by",
]

#: What `torch.compile` wraps a module in.
COMPILED = "torch._dynamo.eval_frame.OptimizedModule"

# Exact types only: a subclass may have its own forward, which a masked layer would bypass in silence.
# Types of other libraries go by qualified name, so that nothing is imported to look them up.
MASKABLE: Mapping[type[nn.Module] | str, str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv",
    nn.Conv2d: "conv",
    nn.Conv3d: "conv",
    nn.ConvTranspose1d: "conv",
    nn.ConvTranspose2d: "conv",
    nn.ConvTranspose3d: "conv",
    nn.Embedding: "embedding",
    nn.MultiheadAttention: "attention",
    "transformers.pytorch_utils.Conv1D": "conv1d_transformers",
    # Only its constructor differs from nn.Conv2d.
    "transformers.models.efficientnet.modeling_efficientnet.EfficientNetDepthwiseConv2d": "conv",
    # These compute with a transformed weight or pad as TensorFlow does: their own forward is kept.
    "timm.layers.conv2d_same.Conv2dSame": "substituted",
    "timm.layers.std_conv.StdConv2d": "substituted",
    "timm.layers.std_conv.StdConv2dSame": "substituted",
    "timm.layers.std_conv.ScaledStdConv2d": "substituted",
    "timm.layers.std_conv.ScaledStdConv2dSame": "substituted",
}

#: Attention that takes the weight of its `qkv` and never calls it.
READERS = frozenset(
    {
        "timm.models.beit.Attention",
        "timm.models.eva.EvaAttention",
        "timm.models.swin_transformer_v2.WindowAttention",
    }
)

#: The kinds that are convolutions ("conv1d_transformers" is a Linear with a transposed weight).
CONVOLUTIONS = frozenset({"conv", "substituted"})

_NORMS = (
    nn.modules.batchnorm._NormBase,  # BatchNorm, SyncBatchNorm and InstanceNorm of every dimension
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
_NORM_NAME = re.compile(r"(?:Batch|Layer|Group|Instance|RMS|Rms|Response|Evo|Simple)Norm")


def type_name(module: nn.Module) -> str:
    """The module's class as `package.module.Class`, the form of the string keys of MASKABLE."""
    cls = type(module)
    return f"{cls.__module__}.{cls.__qualname__}"


def kind_of(module: nn.Module) -> str | None:
    """The kind of a maskable module ("linear", "conv", …), or None where its exact type is not supported."""
    return MASKABLE.get(type(module)) or MASKABLE.get(type_name(module))


def sizes_of(module: nn.Module) -> dict[str, int]:
    """Sizes that PEFT and models read from a layer, wrapped or not: `in_features` and so on, by name."""
    pairs = (
        ("in_features", "out_features"),
        ("in_channels", "out_channels"),
        ("num_embeddings", "embedding_dim"),
        ("nx", "nf"),
        ("embed_dim", "embed_dim"),
        ("num_features", "num_features"),
    )
    found = next((pair for pair in pairs if all(hasattr(module, size) for size in pair)), None)
    if found is None:
        return {}
    own = {size: int(getattr(module, size)) for size in found if size.startswith(("in_", "out_"))}
    return {"in_features": getattr(module, found[0]), "out_features": getattr(module, found[1]), **own}


def is_norm(module: nn.Module) -> bool:
    """Whether the module normalises activations: torch's norms, timm's BatchNormAct2d, the RMSNorms of transformers.

    Classes outside torch go by name and must hold vectors only, so that blocks such as `PreNorm` do not count.
    """
    if isinstance(module, _NORMS):
        return True
    named = _NORM_NAME.search(type(module).__name__) is not None
    return named and all(parameter.squeeze().ndim <= 1 for parameter in module.parameters())


def wrapped_by(module: nn.Module) -> nn.Module | None:
    """The module inside a wrapper of PEFT or `torch.compile`, by its type; None for any other module."""
    if isinstance(module, BaseTunerLayer):
        return module._modules.get("base_layer")
    if isinstance(module, AuxiliaryTrainingWrapper):
        return module._modules.get("original_module")
    return module._modules.get("_orig_mod") if type_name(module) == COMPILED else None


def iter_layers(model: nn.Module, *, parts: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, as `(name, module)`, a module before its parts, seeing through PEFT's wrappers.

    A wrapped layer appears under the wrapper's name as the layer it wraps, a `modules_to_save` wrapper as the
    original module.

    Args:
        model: A base model, with or without adapters.
        parts: List the parts of maskable modules too; those of a MultiheadAttention belong to it.
    """
    yield from _walk("", model, set(), parts)


def _walk(name: str, module: nn.Module, seen: set[int], parts: bool) -> Iterator[tuple[str, nn.Module]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    if (inner := wrapped_by(module)) is not None:
        yield from _walk(name, inner, seen, parts)
        return
    yield name, module
    if parts or kind_of(module) is None:
        for child_name, child in module.named_children():
            yield from _walk(f"{name}.{child_name}" if name else child_name, child, seen, parts)
