# SPDX-License-Identifier: Apache-2.0
"""The table of layers that every feature of the tuner is tested on, and what the tests share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm.layers
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from smn_peft import MaskConfig, MaskModel
from smn_peft.tuner import MaskLayer

__all__ = [
    "BY_NAME",
    "CASES",
    "REPRESENTATIVES",
    "Case",
    "Net",
    "layer_of",
    "mask_bits",
    "masked_model",
    "reference",
    "train",
]


class Net(nn.Module):
    """One layer under test, `body`, and a frozen classifier."""

    def __init__(self, body: nn.Module, features: int) -> None:
        super().__init__()
        self.body = body
        self.classify = nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, …) -> (batch, 3)."""
        if hasattr(self.body, "in_proj_bias"):
            keys, values = (x[..., : self.body.kdim], x[..., : self.body.vdim])
            out = self.body(x, keys, values)[0]
        else:
            out = self.body(x)
        return self.classify(out.flatten(1).to(self.classify.weight.dtype))


@dataclass(frozen=True)
class Case:
    """A layer, an input for it and the options of its mask.

    Attributes:
        name: Id of the case.
        build: Makes the layer.
        shape: Shape of an input; of indices where `vocabulary` is set.
        weights: Paths of the tensors that are masked.
        options: Options of the `MaskConfig`.
        dtype: Dtype of the base model.
        vocabulary: Number of embeddings, for inputs of indices.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    weights: tuple[str, ...] = ("weight",)
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    vocabulary: int | None = None

    def inputs(self, seed: int = 0) -> Tensor:
        """A batch."""
        generator = torch.Generator().manual_seed(seed)
        if self.vocabulary is not None:
            return torch.randint(0, self.vocabulary, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator).to(self.dtype)

    def base(self, frozen: bool = True) -> Net:
        """The base model: always the same weights.

        Frozen for comparisons of bits: torch's matmul takes another path for a weight that requires a gradient.
        """
        with torch.random.fork_rng():
            torch.manual_seed(7)
            body = self.build()
            for parameter in body.parameters():
                if not parameter.any():  # torch starts attention's biases at zero: a mask would show nothing
                    nn.init.normal_(parameter)
            with torch.no_grad():
                out = body.to(self.dtype)
                probe = Net(out, 1)
                probe.classify = nn.Identity()  # type: ignore[assignment]
                probe.classify.weight = nn.Parameter(torch.zeros(1, dtype=self.dtype))  # type: ignore[union-attr]
                features = probe(self.inputs()).shape[1]
            return Net(body, features).to(self.dtype).eval().requires_grad_(not frozen)

    def config(self, **options: Any) -> MaskConfig:
        """The mask's configuration."""
        return MaskConfig(target_modules=["body"], **{**self.options, **options})

    def random(self, seed: int = 1, **options: Any) -> MaskConfig:
        """A configuration that starts from a random mask of half density."""
        return self.config(init_weights=False, seed=seed, **options)

    @property
    def tolerance(self) -> dict[str, float]:
        """For results that may be rounded in another order."""
        size = {torch.float64: 1e-12, torch.float32: 1e-5}.get(self.dtype, 5e-2)
        return {"rtol": size, "atol": size}


def _attention(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.MultiheadAttention(8, 2, batch_first=True, **options)


def _conv(dims: int, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(nn, f"Conv{dims}d")(*args, **options)


def _transposed(dims: int, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(nn, f"ConvTranspose{dims}d")(*args, **options)


_PACKED = ("in_proj_weight", "out_proj.weight")
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
_BIASES = ("in_proj_bias", "out_proj.bias")
_BIAS = {"mask_bias": True}
_ROWS, _BOTH = {"granularity": "row"}, {"granularity": "column+weight"}

CASES = [
    Case("linear", lambda: nn.Linear(11, 5), (4, 11)),
    Case("linear-no-bias", lambda: nn.Linear(11, 5, bias=False), (4, 11)),
    Case("linear-3d", lambda: nn.Linear(11, 5), (4, 3, 11)),
    Case("linear-bias", lambda: nn.Linear(11, 5), (4, 11), ("weight", "bias"), _BIAS),
    Case("linear-bf16", lambda: nn.Linear(11, 5), (4, 11), dtype=torch.bfloat16),
    Case("linear-fp64", lambda: nn.Linear(11, 5), (4, 11), dtype=torch.float64),
    Case("linear-unscaled", lambda: nn.Linear(11, 5), (4, 11), options={"scale": False}),
    Case("linear-threshold", lambda: nn.Linear(11, 5), (4, 11), options={"threshold": 0.25, "init_score": 0.75}),
    Case("linear-rows", lambda: nn.Linear(11, 5), (4, 11), ("weight", "bias"), _ROWS),
    Case("linear-columns-and-weights", lambda: nn.Linear(11, 5), (4, 11), options=_BOTH),
    Case("conv1d", _conv(1, 3, 5, 3, stride=2, dilation=2), (4, 3, 13)),
    Case("conv1d-circular", _conv(1, 3, 5, 3, padding=2, padding_mode="circular"), (4, 3, 9)),
    Case("conv2d", _conv(2, 3, 5, 3, stride=2, padding=1), (4, 3, 7, 6)),
    Case("conv2d-bias", _conv(2, 3, 5, 3), (4, 3, 7, 6), ("weight", "bias"), _BIAS),
    Case("conv2d-columns-and-weights", _conv(2, 3, 5, 3), (4, 3, 7, 6), options=_BOTH),
    Case("conv2d-grouped", _conv(2, 4, 6, 3, groups=2, bias=False), (4, 4, 6, 6)),
    Case("conv2d-depthwise", _conv(2, 5, 10, 3, groups=5), (4, 5, 6, 6)),
    Case("conv2d-reflect", _conv(2, 3, 5, 3, padding=(2, 1), padding_mode="reflect"), (4, 3, 6, 6)),
    Case("conv2d-replicate", _conv(2, 3, 5, 3, padding=1, padding_mode="replicate"), (4, 3, 6, 6)),
    Case("conv2d-same", _conv(2, 3, 5, (4, 3), padding="same", dilation=2), (4, 3, 9, 8)),
    Case("conv2d-bf16", _conv(2, 3, 5, 3), (4, 3, 7, 6), dtype=torch.bfloat16),
    Case("conv3d", _conv(3, 2, 3, 2, padding=1), (4, 2, 4, 5, 3)),
    Case("transposed1d", _transposed(1, 3, 4, 3, stride=2, output_padding=1), (4, 3, 5)),
    Case("transposed2d", _transposed(2, 4, 6, 3, stride=2, padding=1, groups=2), (4, 4, 4, 5)),
    Case("transposed3d", _transposed(3, 2, 3, 2, dilation=2, bias=False), (4, 2, 3, 3, 3)),
    Case("conv1d-transformers", lambda: Conv1D(5, 11), (4, 3, 11)),
    Case("conv1d-transformers-bias", lambda: Conv1D(5, 11), (4, 3, 11), ("weight", "bias"), _BIAS),
    Case("embedding", lambda: nn.Embedding(13, 5, padding_idx=0), (4, 6), vocabulary=13),
    Case("attention", _attention(), (4, 5, 8), _PACKED),
    Case("attention-bias", _attention(), (4, 5, 8), _PACKED + _BIASES, _BIAS),
    Case("attention-no-bias", _attention(bias=False), (4, 5, 8), _PACKED, _BIAS),
    Case("attention-rows", _attention(), (4, 5, 8), _PACKED + _BIASES, _ROWS),
    Case("attention-separate", _attention(kdim=6, vdim=7), (4, 5, 8), _SEPARATE),
    Case("attention-kv", _attention(add_bias_kv=True, add_zero_attn=True), (4, 5, 8), _PACKED),
    Case("timm-same", lambda: timm.layers.Conv2dSame(3, 5, 3, stride=2), (4, 3, 7, 6)),
    Case("timm-std", lambda: timm.layers.StdConv2d(3, 5, 3), (4, 3, 7, 6)),
    Case("timm-std-same", lambda: timm.layers.StdConv2dSame(3, 5, 3, stride=2), (4, 3, 7, 6)),
    Case("timm-scaled-std", lambda: timm.layers.ScaledStdConv2d(3, 5, 3), (4, 3, 7, 6), ("weight", "bias"), _BIAS),
]
BY_NAME = {case.name: case for case in CASES}
# For what does not depend on how a layer computes: one of each kind of slots, and of each dtype.
REPRESENTATIVES = [
    BY_NAME[name]
    for name in (
        "linear-bias linear-fp64 linear-rows conv2d-bf16 conv2d-columns-and-weights transposed2d conv1d-transformers "
        "embedding attention-bias timm-scaled-std"
    ).split()
]


def masked_model(case: Case, config: MaskConfig | None = None, name: str = "default") -> PeftModel:
    """The base of a case with an adapter on it, in eval mode; without `config` all weights are on."""
    return get_peft_model(case.base(frozen=False), config or case.config(), adapter_name=name).eval()


def layer_of(model: nn.Module) -> MaskLayer:
    """The masked layer of a `Net`."""
    (layer,) = (module for module in model.modules() if isinstance(module, MaskLayer))
    return layer


def mask_bits(model: PeftModel, name: str = "default") -> dict[str, Tensor]:
    """Bool masks by path from the layer."""
    tuner: MaskModel = model.base_model
    return {key.removeprefix("body."): mask.clone() for key, mask in tuner.masks(name).items()}


def reference(case: Case, masks: dict[str, Tensor], scale: bool = True) -> Net:
    """The base with θ·M/σ in the place of its weights, computed here in float64 and without the library."""
    net = copy.deepcopy(case.base())
    assert set(masks) == set(case.weights)
    for path, mask in masks.items():
        parameter = net.body.get_parameter(path)
        sigma = (int(mask.sum()) / mask.numel()) ** 0.5 if scale else 1.0
        with torch.no_grad():
            parameter.copy_(parameter.double() * mask / max(sigma, 1e-30))
    return net


def train(model: nn.Module, x: Tensor, steps: int = 4, lr: float = 0.4) -> None:
    """A few steps on whatever trains, in train mode; the model is in eval mode afterwards.

    Adam, because it moves every score by about `lr` however small the layer's gradient is.
    """
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=lr)
    labels = torch.arange(len(x), device=x.device) % 3
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).float(), labels).backward()
        optimizer.step()
    model.eval()
