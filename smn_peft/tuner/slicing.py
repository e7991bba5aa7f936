# SPDX-License-Identifier: Apache-2.0
"""Smaller models from masks: hidden channels and attention heads that a mask switches off are cut out.

A hidden channel lies between two layers, a *producer* and a *consumer*: a unit of an MLP, a channel between two
convolutions. It can go where the consumer's column is zero, or where the producer's row is and what comes of it is the
same everywhere: that constant goes into the consumer's bias. A head can go where the output projection does not read
it. Whether nothing else reads a channel is found by running the model, so that no architecture need be known.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..storage.files import atomic_write, check_regular
from .targets import HiddenChannels, hidden_channels

__all__ = ["load_sliced", "save_sliced", "slice_model"]


@torch.no_grad()
def slice_model(model: nn.Module, images: Tensor | None = None) -> nn.Module:
    """Cut out of a model what its masks switch off as a whole; the result computes what the masked model computes.

    Masks of ``granularity="column+weight"`` or ``"row+weight"`` have such channels. The result is an ordinary model
    for inference, without adapters: `torch.compile` and ONNX export take it. One channel and one head always stay.

    Args:
        model: A `PeftModel` with masks, or a plain model with weights of zero. It stays as it is.
        images: Images (batch, 3, height, width) that the model is run on; None: two of random pixels, in the size
            that the adapter or the model was made for.

    Raises:
        ValueError: The result does not compute the same.

    Warns:
        UserWarning: Channels are off that cannot be cut, with their layer and the reason.
    """
    sliced: Any = copy.deepcopy(model).eval()
    sliced = sliced.merge_and_unload() if isinstance(sliced, PeftModel) else sliced
    images = _example(model, sliced) if images is None else images
    run = _Run(sliced, images)
    for pair in hidden_channels(sliced):
        _cut_channels(sliced, pair, run)
    for module in list(sliced.modules()):
        _cut_heads(module)
    if not _all_close(_outputs(sliced, images), run.outputs):
        raise ValueError(f"The sliced {type(sliced).__name__} does not compute the same: nothing was cut.")
    return sliced  # type: ignore[no-any-return]


def _example(model: nn.Module, plain: nn.Module) -> Tensor:
    """Two images of random pixels."""
    timms = getattr(getattr(plain, "patch_embed", None), "img_size", None)
    sizes = (
        (getattr(getattr(model, "active_peft_config", None), "preprocessing", None) or {}).get("image_size"),
        timms and timms[0],
        (getattr(plain, "pretrained_cfg", None) or {}).get("input_size", (None,))[-1],
        getattr(getattr(plain, "config", plain), "image_size", None),
    )
    size = next((size for size in sizes if size), 224)
    weight = next(plain.parameters())
    drawn = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    return drawn.to(weight.device, weight.dtype)


def _outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(model(images)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _all_close(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Whether outputs are the same up to rounding: 1e-4 of the largest value in fp32, more in narrower dtypes."""
    return len(found) == len(wanted) and all(
        own.shape == other.shape
        and bool(((own - other).abs() <= max(1e-4, 32 * torch.finfo(own.dtype).eps) * other.abs().max()).all())
        for own, other in zip(found, wanted, strict=True)
    )


class _Run:
    """A forward of the whole model: its outputs, and the order in which modules with tensors were called."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model, self.images = model, images
        self.order: list[nn.Module] = []
        own = (module for module in model.modules() if next(iter(_tensors(module)), None) is not None)
        hooks = [module.register_forward_pre_hook(lambda module, _: self.order.append(module)) for module in own]
        try:
            self.outputs = _outputs(model, images)
        finally:
            for hook in hooks:
                hook.remove()

    def between(self, first: nn.Module, last: nn.Module) -> list[nn.Module]:
        """Modules that were called between two."""
        if first not in self.order or last not in self.order:
            return []
        return self.order[self.order.index(first) + 1 : self.order.index(last)]

    def input_of(self, layer: nn.Module) -> tuple[Tensor, list[Tensor]]:
        """What a layer reads now, and the outputs, which change by rounding with every cut."""
        found: list[Tensor] = []
        hook = layer.register_forward_pre_hook(lambda _, args: found.append(args[0]))
        try:
            outputs = _outputs(self.model, self.images)
        finally:
            hook.remove()
        return found[0], outputs

    def is_only_reader(self, producer: nn.Module, consumer: nn.Module, channels: Tensor, dim: int) -> bool:
        """Whether nothing but the same channels of the consumer's input changes with channels of the producer."""
        own, wanted = self.input_of(consumer)
        shape = [-1 if place == dim % own.dim() else 1 for place in range(own.dim())]
        found: list[Tensor] = []

        def disturb(_: nn.Module, args: Any, output: Tensor) -> Tensor:
            noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
            return torch.where(channels.reshape(shape), noise, output)

        def restore(_: nn.Module, args: Any) -> Tensor:
            found.append(args[0])
            return own

        hooks = producer.register_forward_hook(disturb), consumer.register_forward_pre_hook(restore)
        try:
            outputs = _outputs(self.model, self.images)
        finally:
            for hook in hooks:
                hook.remove()
        own, changed = (x.movedim(dim, 0)[~channels] for x in (own, found[0]))
        return _all_close([*outputs, changed], [*wanted, own])


def _cut_channels(model: nn.Module, pair: HiddenChannels, run: _Run) -> None:
    """Cut the channels between two layers that are off, unless something else reads them."""
    producer: Any = model.get_submodule(pair.producer)
    consumer: Any = model.get_submodule(pair.consumer)
    unmade = ~producer.weight.flatten(1).any(1) & (True if producer.bias is None else producer.bias == 0)
    unread = ~consumer.weight.transpose(0, 1).flatten(1).any(1)
    if not (unmade | unread).any():
        return
    dim = -1 if isinstance(consumer, nn.Linear) else 1
    values = run.input_of(consumer)[0].movedim(dim, 0).flatten(1)
    constants = values[:, 0]
    steady = (values == values[:, :1]).all(1)
    padding: Any = getattr(consumer, "padding", 0)
    reaches = steady & (constants == 0) if isinstance(padding, str) or any(padding or ()) else steady
    gone = unread | (unmade & reaches)
    if (left := int((unmade & ~gone).sum())) and not steady[unmade].any():
        _warn(f"{left} channels of {pair.producer} are off and stay: {pair.consumer} does not read them alone.")
    elif left:
        fix = f"granularity 'column' for {pair.consumer} switches off what it reads"
        _warn(f"{left} channels of {pair.producer} are off and stay: {pair.consumer} pads what comes of them; {fix}.")
    if gone.all():
        gone[0] = False
    if not gone.any():
        return
    if not run.is_only_reader(producer, consumer, gone, dim):
        _warn(f"{int(gone.sum())} channels of {pair.producer} are off and stay: not only {pair.consumer} reads them.")
        return
    kernel = consumer.weight.flatten(2).sum(2) if dim == 1 else consumer.weight
    shift = kernel @ constants.masked_fill(~gone | unread, 0).to(kernel.dtype)
    for module in (producer, *run.between(producer, consumer)):
        _set(module, {name: tensor[~gone] for name, tensor in _tensors(module) if len(gone) in tensor.shape[:1]})
    biases = {"bias": shift if consumer.bias is None else consumer.bias + shift} if shift.any() else {}
    _set(consumer, {"weight": consumer.weight[:, ~gone], **biases})


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)


def _cut_heads(attention: nn.Module) -> None:
    """Cut the heads that the output projection does not read, or that hold no values."""
    found = _projections(attention)
    if found is None:
        return
    inputs, output, heads = found
    values = inputs[-1].weight.chunk(3 // len(inputs))[-1]
    biases = None if inputs[-1].bias is None else inputs[-1].bias.chunk(3 // len(inputs))[-1]
    unmade = ~values.any(1) & (True if biases is None else biases == 0)
    gone = (unmade | ~output.weight.any(0)).reshape(heads, -1).all(1)
    if gone.all():
        gone[0] = False
    if gone.any():
        keep = (~gone).repeat_interleave(len(values) // heads)
        for layer in inputs:
            rows = keep.repeat(len(layer.weight) // len(keep))
            _set(layer, {name: tensor[rows] for name, tensor in _tensors(layer)})
        _set(output, {"weight": output.weight[:, keep]})
        _set_heads(attention, int((~gone).sum()))


def _projections(attention: nn.Module) -> tuple[list[Any], Any, int] | None:
    """Projections of queries, keys and values, in one layer or three, that of the output, and the number of heads."""
    heads, layers = getattr(attention, "num_heads", None), list(attention.children())
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    others = [module for layer in layers if layer not in linear for module in layer.modules()]
    if not isinstance(heads, int) or len(linear) not in (2, 4):
        return None
    if any(any(True for _ in _tensors(module)) for module in (attention, *others)):
        return None
    if len(linear) == 4:  # a model may list keys first
        named = {name.split("_")[0][0]: layer for name, layer in attention.named_children() if layer in linear}
        if named.keys() != set("qkvo"):
            return None
        linear = [named[letter] for letter in "qkvo"]
    *inputs, output = linear
    width = output.in_features
    fits = all(layer.out_features == width * (3 // len(inputs)) for layer in inputs) and width % heads == 0
    return (inputs, output, heads) if fits else None


# --- Tensors of other sizes ------------------------------------------------------------------------------------------

_SIZES = {"out_features": 0, "in_features": 1, "out_channels": 0, "in_channels": 1, "num_features": 0}


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and buffers by name, without counters."""
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return ((name, tensor) for name, tensor in own if tensor.dim())


def _set(module: Any, tensors: Mapping[str, Tensor]) -> None:
    """Replace tensors of a module by those of other sizes, and what it says of its sizes."""
    for name, tensor in tensors.items():
        if name in module._buffers:
            module._buffers[name] = tensor.contiguous()
        else:
            module._parameters[name] = nn.Parameter(tensor.contiguous(), requires_grad=False)
    for name, dim in _SIZES.items():
        if hasattr(module, name) and "weight" in tensors:
            setattr(module, name, tensors["weight"].shape[dim])


def _set_heads(attention: Any, heads: int) -> None:
    """Set the number of heads of an attention, and of the channels of all together where it says that."""
    if hasattr(attention, "attn_dim"):
        attention.attn_dim = attention.attn_dim // attention.num_heads * heads
    attention.num_heads = heads


def save_sliced(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a sliced model's tensors, and its attentions' numbers of heads, as safetensors for [`load_sliced`]."""
    heads = {name: module.num_heads for name, module in model.named_modules() if _projections(module)}
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with atomic_write(path) as file:
        file.write(save(tensors, {"format": "pt", "heads": json.dumps(heads)}))


def load_sliced(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load what [`save_sliced`] wrote into a model of the original sizes, in place; returns the model.

    Raises:
        ValueError: The file is of another architecture.
    """
    check_regular(path)
    try:
        with safe_open(path, "pt") as file:
            heads = json.loads((file.metadata() or {}).get("heads", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}. Write it again with save_sliced.") from error
    own = dict((*model.named_parameters(), *model.named_buffers()))
    smaller = {name: tensor for name, tensor in tensors.items() if name in own and tensor.shape != own[name].shape}
    for name, tensor in smaller.items():
        sizes = tuple(tensor.shape), tuple(own[name].shape)
        if len(sizes[0]) != len(sizes[1]) or any(new > old for new, old in zip(*sizes, strict=True)):
            raise ValueError(
                f"{path} is not of a {type(model).__name__} of this size: {name} {sizes[0]}, not {sizes[1]}."
            )
    for name, module in model.named_modules():
        prefix, known = f"{name}." if name else "", ("weight", *dict(_tensors(module)))
        _set(module, {key: smaller[prefix + key] for key in known if prefix + key in smaller})
        if getattr(module, "bias", 0) is None and prefix + "bias" in tensors:  # of constants
            _set(module, {"bias": tensors[prefix + "bias"]})
        if isinstance(heads.get(name), int) and 0 < heads[name] < getattr(module, "num_heads", 0):
            _set_heads(module, heads[name])
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} is not of a {type(model).__name__} of this size: {error}") from error
    return model
