# SPDX-License-Identifier: Apache-2.0
"""Which modules a mask adapter targets: shorthands resolved, and a report of what would be masked and why not."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import Tensor, nn

from .architectures import base_model_of, default_targets, exact_targets, head_modules, matching_names
from .kinds import CONVOLUTIONS, MASKABLE, is_norm, iter_layers, kind_of
from .norms import norm_form_of, with_norms

__all__ = [
    "MASKABLE",
    "TargetReport",
    "TargetRow",
    "default_targets",
    "explain_targets",
    "is_norm",
    "kind_of",
    "resolve_targets",
]

ALL_CONV = "all-conv"
ALL_LINEAR = "all-linear"


def resolve_targets(
    model: nn.Module,
    target_modules: str | Iterable[str] | None,
    *,
    layers_to_transform: Iterable[int] | int | None = None,
    layers_pattern: Iterable[str] | str | None = None,
) -> str | list[str] | set[str]:
    """Replace our shorthands by names or a regex that PEFT understands.

    Args:
        model: The base model.
        target_modules: None gives the architecture's default, "all-conv" every convolution that can be masked except
            the classifier. Everything else is PEFT's to interpret and comes back as it is, "all-linear" too.
        layers_to_transform: Indices of blocks. PEFT ignores them for a regex and for full names, so a resolved
            shorthand is reduced to those blocks here.
        layers_pattern: Name of the list that the indices count in; None takes the first numbered list in a name.

    Raises:
        ValueError: Nothing is left to target, or the architecture has no default.
    """
    if target_modules is None:
        targets = default_targets(model)
    elif isinstance(target_modules, str) and target_modules.lower() == ALL_CONV:
        targets = _all_convolutions(model)
    else:
        return target_modules if isinstance(target_modules, (str, set)) else list(target_modules)
    if layers_to_transform is None:
        return targets
    indices = {layers_to_transform} if isinstance(layers_to_transform, int) else set(layers_to_transform)
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern or [r"[^.]*"])
    numbered = re.compile(rf"(?:.*?\.)??(?:{'|'.join(patterns)})\.(\d+)\.")
    names = [
        name
        for name in matching_names(model, targets)
        if (found := numbered.match(name)) is not None and int(found[1]) in indices
    ]
    if not names:
        raise ValueError(
            f"None of the default targets lies in layers_to_transform={sorted(indices)} with layers_pattern="
            f"{layers_pattern!r}; they are named like {matching_names(model, targets)[0]!r}."
        )
    return exact_targets(model, names)


def _all_convolutions(model: nn.Module) -> str | list[str]:
    heads = head_modules(model, by_name=False)
    names = [name for name, layer in iter_layers(model) if kind_of(layer) in CONVOLUTIONS and id(layer) not in heads]
    if not names:
        raise ValueError(
            f"target_modules='all-conv' finds no convolution that can be masked in {type(model).__qualname__}: "
            "explain_targets(model) lists its layers."
        )
    return exact_targets(model, names)


@dataclass(frozen=True)
class TargetRow:
    """One layer of the report.

    Attributes:
        name: Full name in the model; the parameter's name where a container holds it itself.
        type: Class of the layer, "Parameter" for one held by a container.
        shape: Shape of the (first) weight.
        parameters: Number of values in the layer, biases included.
        masked: Number of values that get a bit.
        reason: "masked", or why not: "norm", "head", "embedding", "excluded", "modules_to_save", "not targeted" or
            "unsupported type …".
    """

    name: str
    type: str
    shape: tuple[int, ...]
    parameters: int
    masked: int
    reason: str


@dataclass(frozen=True)
class TargetReport:
    """What an adapter masks in a model; `str()` gives the table.

    Attributes:
        rows: One per layer, in the model's order.
        total_parameters: Values in the model, each once, adapters not counted.
        packed_bytes: Size of the bit-packed masks, ⌈n/8⌉ per tensor.
        note: Why nothing is masked, where the architecture has no default.
    """

    rows: tuple[TargetRow, ...]
    total_parameters: int
    packed_bytes: int
    note: str = field(default="")

    @property
    def masked_weights(self) -> int:
        """Number of values that get a bit."""
        return sum(row.masked for row in self.rows)

    @property
    def score_bytes(self) -> int:
        """Size of the fp32 scores while training."""
        return 4 * self.masked_weights

    def __str__(self) -> str:
        """The table and the totals."""
        head = ("module", "type", "shape", "parameters", "masked", "")
        lines = [
            (row.name, row.type, "×".join(map(str, row.shape)), f"{row.parameters:,}", f"{row.masked:,}", row.reason)
            for row in self.rows
        ]
        widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]
        align = ("<", "<", "<", ">", ">", "<")
        table = [
            "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, align, widths, strict=True)).rstrip()
            for line in [head, *lines]
        ]
        return "\n".join([*table, "", *self._totals(), *([self.note] if self.note else [])])

    def _totals(self) -> list[str]:
        masked = [row for row in self.rows if row.masked]
        totals = []
        for kind in dict.fromkeys(row.type for row in masked):
            same = [row for row in masked if row.type == kind]
            totals.append(f"{kind}: {len(same)} layers, {sum(row.masked for row in same):,} masked weights")
        share = self.masked_weights / max(1, self.total_parameters)
        return [
            *totals,
            f"masked: {self.masked_weights:,} of {self.total_parameters:,} parameters ({share:.2%})",
            f"adapter file: {_megabytes(self.packed_bytes)} packed; "
            f"scores while training: {_megabytes(self.score_bytes)} (fp32)",
        ]


def explain_targets(model: nn.Module, config: Any = None, *, verbose: bool = True) -> TargetReport:
    """What would be masked in `model`, per layer and in total, and why the rest is not.

    Args:
        model: A base model, with or without adapters.
        config: A `MaskConfig`, or any object with some of its fields; None shows the architecture's default.
        verbose: Print the report.
    """
    model = base_model_of(model)
    match: Any = SimpleNamespace(
        target_parameters=None,
        task_type=getattr(config, "task_type", None),
        **{
            option: getattr(config, option, None)
            for option in ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
        },
    )
    note = ""
    try:
        match.target_modules = resolve_targets(
            model,
            getattr(config, "target_modules", None),
            layers_to_transform=match.layers_to_transform,
            layers_pattern=match.layers_pattern,
        )
    except ValueError as error:  # the report is what the error advises to look at
        match.target_modules, note = [], str(error)
    if isinstance(match.target_modules, str) and match.target_modules.lower() == ALL_LINEAR:
        _maybe_include_all_linear_layers(match, model)
    match.mask_norms = bool(getattr(config, "mask_norms", False))
    if match.mask_norms:
        match.target_modules = with_norms(model, match.target_modules)
    mask_bias = bool(getattr(config, "mask_bias", False))
    heads = head_modules(model)
    counted: set[int] = set()
    rows, packed_bytes = [], 0
    for name, layer in iter_layers(model):
        whole = kind_of(layer) is not None
        parameters = [
            (key, value) for key, value in layer.named_parameters(recurse=whole) if not _seen(value, counted)
        ]
        if not parameters:
            continue
        reason = _reason(name, layer, match, heads)
        masked = [value for key, value in parameters if _is_masked(key, mask_bias)] if reason == "masked" else []
        packed_bytes += sum(-(-value.numel() // 8) for value in masked)
        is_layer = not any(True for _ in layer.children()) or whole or is_norm(layer)
        for group in [parameters] if is_layer else [[parameter] for parameter in parameters]:
            full_name = name if is_layer else f"{name}.{group[0][0]}".lstrip(".")
            rows.append(
                TargetRow(
                    name=full_name,
                    type=type(layer).__name__ if is_layer else "Parameter",
                    shape=tuple(group[0][1].shape),
                    parameters=sum(value.numel() for _, value in group),
                    masked=sum(value.numel() for value in masked),
                    reason="embedding" if not is_layer and re.search(r"embed|token", group[0][0]) else reason,
                )
            )
    report = TargetReport(tuple(rows), sum(row.parameters for row in rows), packed_bytes, note)
    if verbose:
        print(report)
    return report


def _reason(name: str, layer: nn.Module, match: Any, heads: set[int]) -> str:
    """Why a layer is masked or not."""
    kind = kind_of(layer)
    matrices = any(parameter.ndim > 1 for parameter in layer.parameters(recurse=False))
    found = check_target_module_exists(match, name)
    if found:
        maskable = kind is not None or (match.mask_norms and norm_form_of(layer) is not None)
        return "masked" if maskable else f"unsupported type {type(layer).__name__}"
    if found is not None and type(found).__name__ == "_ExcludedModule":
        saved = any(re.match(rf"(?:^|.*\.){part}(?:$|\..*)", name) for part in match.modules_to_save or ())
        return "modules_to_save" if saved else "excluded"
    if is_norm(layer):
        return "norm"
    if id(layer) in heads:
        return "head"
    if kind == "Embedding" or re.search(r"embed", name):
        return "embedding"
    return f"unsupported type {type(layer).__name__}" if kind is None and matrices else "not targeted"


def _is_masked(parameter_name: str, mask_bias: bool) -> bool:
    is_bias = parameter_name.rpartition(".")[2] in ("bias", "in_proj_bias", "bias_k", "bias_v")
    return not is_bias or (mask_bias and parameter_name not in ("bias_k", "bias_v"))


def _seen(value: Tensor, counted: set[int]) -> bool:
    if id(value) in counted:
        return True
    counted.add(id(value))
    return False


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"
