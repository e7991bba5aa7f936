# SPDX-License-Identifier: Apache-2.0
"""Which modules a mask adapter targets: defaults by architecture, shorthands resolved, and a report of it all.

The default is the weights of a vision model's blocks, never embeddings, norms or the head. The rules look at a model's
structure, not at a list of class names, so they hold for sizes and variants not seen yet:

* **transformers** (attention in numbered blocks): every Linear, attention and convolution inside the blocks; the patch
  embedding is frozen. A regex, so that one adapter's config fits every size of the architecture.
* **convolutional networks**: all convolutions, stem and shortcuts included, and the Linears of numbered stages (the
  MLPs of ConvNeXt). Explicit names.
* **the rest** (MLP-Mixer): every Linear inside the numbered blocks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn

from .forms import COMPILED, CONVOLUTIONS, DENSE, Embedding, is_norm, iter_layers, mask_layer_for, type_name

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LIBRARIES = frozenset({"transformers", "timm", "torchvision", "open_clip", "clip"})
_TOWERS = ("timm_model", "vision_model", "visual", "trunk")  # TimmWrapper, CLIP and SigLIP, OpenCLIP, its timm towers
_TEXTS = ("text_model", "language_model", "text", "token_embedding")  # beside it; the last two are OpenCLIP's
_ATTENTION = re.compile(r"(?:^|[._])(?:\w*attn|\w*attention|qkv|[qkv]_proj|quer(?:y|ies))(?:$|[._])")
_NUMBERED = re.compile(r"\d\.")  # a module above the layer is one of a numbered list
_EMBEDDING = re.compile(r"(?:^|\.)(?:\w*embed\w*|stem\w*|cpb_mlp|continuous_position_bias_mlp|rel_pos\w*)\.")
_OTHER_TASK = re.compile(r"^(?:decoder|predictor|pre_logits|aux\d?|AuxLogits)(?:\.|$)")
_HEAD_NAMES = frozenset(
    {"head", "heads", "fc", "classifier", "last_linear", "distillation_classifier", "cls_classifier"}
)
_ADVICE = (
    "Pass target_modules=…: a list of module names, a regex, 'all-linear' or 'all-conv'; explain_targets(model) lists "
    "what can be masked."
)


def default_targets(model: nn.Module) -> str | list[str]:
    """The default `target_modules` of a model of transformers, timm, torchvision or OpenCLIP (its vision tower).

    It is a regex that `re.fullmatch`es the full module names, or a list of them.
    """
    model = base_model_of(model)
    if not _is_known(model):
        raise ValueError(f"{type_name(model)} has no default target modules. {_ADVICE}")
    prefix, core = _vision_core(model)
    heads = head_modules(model)
    layers = {
        name: layer
        for name, layer in iter_layers(core)
        if mask_layer_for(layer) and id(layer) not in heads and not _OTHER_TASK.match(name)
    }
    in_blocks = [name for name in layers if _NUMBERED.search(name) and not _EMBEDDING.search(name)]
    dense = [name for name in in_blocks if mask_layer_for(layers[name]) in DENSE]
    convolutions = [name for name, layer in layers.items() if mask_layer_for(layer) in CONVOLUTIONS]
    if any(_ATTENTION.search(name) for name in dense):
        stems = {name for name in convolutions if getattr(layers[name], "in_channels", None) == 3}  # of images
        names = dense + [name for name in in_blocks if name in convolutions and name not in stems]
        return _regex_or_list(model, prefix, names)
    if len(convolutions) > 1:
        return exact_targets(model, [prefix + name for name in convolutions + dense])
    if dense:
        return _regex_or_list(model, prefix, dense)
    raise ValueError(f"{type_name(model)} has no layer in its blocks that can be masked. {_ADVICE}")


def base_model_of(model: nn.Module) -> nn.Module:
    """The model inside a `PeftModel` or a compiled one; any other model as it is."""
    unwrap = getattr(model, "get_base_model", None)
    base = unwrap() if callable(unwrap) else model
    base = base if isinstance(base, nn.Module) else model
    return base.get_submodule("_orig_mod") if type_name(base) == COMPILED else base


def head_modules(model: nn.Module, *, by_name: bool = True) -> set[int]:
    """Ids of the modules that make up the classifier; `by_name` counts modules named like one, too."""
    heads: list[Any] = []
    for owner in (model, _vision_core(model)[1]):
        for getter in ("get_classifier", "get_output_embeddings"):
            with suppress(AttributeError, NotImplementedError, TypeError):
                found = getattr(owner, getter)()
                heads += found if isinstance(found, (list, tuple)) else [found]
        # timm names its classifier itself, and may call a feature layer "head" or "fc"
        if by_name and not hasattr(owner, "get_classifier"):
            heads += [child for name, child in owner.named_children() if name in _HEAD_NAMES]
    return {id(module) for head in heads if isinstance(head, nn.Module) for module in head.modules()}


def exact_targets(model: nn.Module, names: Iterable[str]) -> str | list[str]:
    """Targets that select exactly these modules.

    PEFT also matches a listed name as a suffix ("conv1" takes "layer1.0.conv1"). Where that would select a module
    that is not listed, the names become a regex, which matches in full.
    """
    chosen = list(names)
    is_exact = set(matching_names(model, chosen)) <= set(chosen)
    return chosen if is_exact else "|".join(map(re.escape, chosen))


def matching_names(model: nn.Module, targets: str | Iterable[str]) -> list[str]:
    """Full names of the modules that `targets` selects, as PEFT would: regex in full, list by name or suffix."""
    names = (name for name, _ in model.named_modules())
    if isinstance(targets, str):
        pattern = re.compile(targets)
        return [name for name in names if pattern.fullmatch(name)]
    listed = set(targets)
    suffixes = tuple(f".{name}" for name in listed)
    return [name for name in names if name in listed or name.endswith(suffixes)]


def _is_known(model: nn.Module) -> bool:
    libraries = {cls.__module__.partition(".")[0] for cls in type(model).__mro__} & _LIBRARIES
    inner = getattr(model, str(getattr(model, "base_model_prefix", "")), None)
    if not libraries and isinstance(inner, nn.Module):  # a head of one's own on a backbone
        return _is_known(inner)
    if "transformers" in libraries:
        has_tower = any(isinstance(getattr(model, tower, None), nn.Module) for tower in _TOWERS)
        return has_tower or getattr(model, "main_input_name", None) == "pixel_values"
    towers = (model, getattr(model, "visual", None))
    open_clip = any(hasattr(getattr(tower, "transformer", None), "resblocks") for tower in towers)
    return bool(libraries) or hasattr(model, "pretrained_cfg") or open_clip


def _vision_core(model: nn.Module) -> tuple[str, nn.Module]:
    """The module that holds the vision blocks, and its name in the model, ending in a dot unless empty."""
    prefix, core = "", model
    while True:
        attributes = [*_TOWERS, getattr(core, "base_model_prefix", "")]
        inner = next((name for name in attributes if name and isinstance(getattr(core, name, None), nn.Module)), None)
        if inner is None:
            return prefix, core
        prefix, core = f"{prefix}{inner}.", getattr(core, inner)


def vision_scope(model: nn.Module) -> str:
    """Prefix of the names in the vision tower of a model that has a text tower too; "" for any other model."""
    owner, scope = model, _vision_core(model)[0]
    for part in scope.split("."):
        if any(isinstance(getattr(owner, text, None), nn.Module) for text in _TEXTS):
            return scope
        owner = getattr(owner, part, owner)
    return ""


def _regex_or_list(model: nn.Module, prefix: str, names: list[str]) -> str | list[str]:
    """The most portable pattern that selects exactly `names` in this model, else the names."""
    wanted = {prefix + name for name in names}
    numbered = (re.sub(r"(^|\\\.|_)\d+(?=\\\.)", r"\1\\d+", re.escape(name)) for name in names)
    body = f"(?:{'|'.join(dict.fromkeys(numbered))})"
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    two_towers = "vision_model." in prefix or str(model_type).endswith("_vision_model")
    guard = r"(?!(?:.*\.)?(?:text_model|language_model)\.)" if two_towers else ""
    for pattern in (rf"{guard}(?:.*\.)?{body}", rf"(?:.*\.)?{re.escape(prefix)}{body}"):
        if set(matching_names(model, pattern)) == wanted:
            return pattern
    return exact_targets(model, [prefix + name for name in names])


def resolve_targets(
    model: nn.Module,
    target_modules: str | Iterable[str] | None,
    *,
    granularity: str = "weight",
    layers_to_transform: Iterable[int] | int | None = None,
    layers_pattern: Iterable[str] | str | None = None,
) -> str | list[str] | set[str]:
    """Replace our shorthands by names or a regex that PEFT understands.

    None gives the architecture's default, for rows or columns alone [`unit_targets`]; "all-conv" every convolution
    that can be masked except the classifier; both are reduced to the blocks of `layers_to_transform`, which PEFT
    ignores for a regex and for full names. Everything else is PEFT's to interpret and comes back as it is,
    "all-linear" too.
    """
    if target_modules is None:
        alone = granularity in ("row", "column")
        targets = exact_targets(model, unit_targets(model, granularity)) if alone else default_targets(model)
    elif isinstance(target_modules, str) and target_modules.lower() == "all-conv":
        heads, layers = head_modules(model, by_name=False), iter_layers(model)
        convolutions = [name for name, m in layers if mask_layer_for(m) in CONVOLUTIONS and id(m) not in heads]
        if not convolutions:
            raise ValueError(
                f"target_modules='all-conv' finds no convolution that can be masked in {type(model).__qualname__}: "
                "explain_targets(model) lists its layers."
            )
        targets = exact_targets(model, convolutions)
    else:
        return target_modules if isinstance(target_modules, (str, set)) else list(target_modules)
    if layers_to_transform is None:
        return targets
    indices = {layers_to_transform} if isinstance(layers_to_transform, int) else set(layers_to_transform)
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern or [r"[^.]*"])
    numbered = re.compile(rf"(?:.*?\.)??(?:{'|'.join(patterns)})\.(\d+)\.")
    known = matching_names(model, targets)
    names = [name for name in known if (found := numbered.match(name)) and int(found[1]) in indices]
    if not names:
        given = f"layers_to_transform={sorted(indices)} with layers_pattern={layers_pattern!r}"
        raise ValueError(f"None of the default targets lies in {given}; they are named like {known[0]!r}.")
    return exact_targets(model, names)


# --- Channels between two layers -------------------------------------------------------------------------------------


class HiddenChannels(NamedTuple):
    """Channels that one layer makes and the next one of the same block reads, by the names of the two."""

    producer: str
    consumer: str


def hidden_channels(model: nn.Module) -> list[HiddenChannels]:
    """Find the pairs of layers that follow each other in a block and have as many outputs as inputs.

    Whether something else reads the channels is not looked at, see [`slice_model`]. Attention's projections, whose
    channels belong to heads, and grouped convolutions are left out.
    """
    found, before = [], ("", nn.Module())
    for name, layer in iter_layers(model):
        if not isinstance(layer, _LAYERS):
            continue
        (earlier, producer), before = before, (name, layer)
        if not isinstance(producer, _LAYERS) or _is_grouped(producer) or _is_grouped(layer):
            continue
        block = _block_of(name)
        together = block == _block_of(earlier) and not hasattr(model.get_submodule(block), "num_heads")
        if together and type(producer) is type(layer) and len(producer.weight) == layer.weight.shape[1]:
            found.append(HiddenChannels(earlier, name))
    return found


def _is_grouped(layer: nn.Module) -> bool:
    return getattr(layer, "groups", 1) > 1


def _block_of(name: str) -> str:
    """Name of the module that a layer lies in; of transformers' `intermediate.dense`, `output.dense` the one above."""
    outer, _, own = name.rpartition(".")
    return outer.rpartition(".")[0] if own == "dense" and outer.endswith(("intermediate", "output")) else outer


def unit_targets(model: nn.Module, granularity: str) -> list[str]:
    """Default targets whose rows, or columns, are channels that only two layers of one block share.

    A mask that switches them off makes a model that `slice_model` makes smaller. ValueError if there are none.
    """
    known = set(matching_names(base_model_of(model), default_targets(model)))
    place = 0 if granularity.startswith("row") else 1
    names = [pair[place] for pair in hidden_channels(base_model_of(model)) if pair[place] in known]
    if not names:
        raise ValueError(f"{type_name(model)} has no hidden channels for granularity={granularity!r}. {_ADVICE}")
    return names


def short_pattern(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Regexes with a pattern for numbers that select exactly these of a model's layers, else the names."""
    numbered = list(dict.fromkeys(re.sub(r"\d+(?=\\\.)", r"\\d+", re.escape(name)) for name in names))
    layers = [name for name, _ in iter_layers(model)]
    exact = {name for name in layers if any(re.fullmatch(f"(.*\\.)?({pattern})", name) for pattern in numbered)}
    return numbered if exact == set(names) else [re.escape(name) for name in names]


# Outermost first: "layer2.0.conv1" lies in the stage "layer" 2, "stages.1.blocks.0.conv1" in "stages" 1.
_STAGE = re.compile(r"(?:^|\.)(layer|layers|stage|stages|blocks?|resblocks)[._]?(\d+)\.")


def stage_of(name: str) -> int | None:
    """Number of the stage in a module's name, or of the block where there are no stages; None in the stem."""
    found = _STAGE.search(name)
    return None if found is None else int(found[2])


def stage_targets(model: nn.Module, target_modules: str | Iterable[str] | None, stages: int) -> str | list[str]:
    """Those of the targets that lie in the first stages (the paper's Figure 8); the stem lies in none."""
    names = matching_names(model, resolve_targets(model, target_modules))
    numbers = sorted({number for name in names if (number := stage_of(name)) is not None})
    if not 1 <= stages <= len(numbers):
        known = f"the targets lie in {len(numbers)} numbered stages or blocks, such as {''.join(names[:1])!r}"
        raise ValueError(f"mask_stages={stages}: {known}.")
    return exact_targets(model, [name for name in names if stage_of(name) in numbers[:stages]])


@dataclass(frozen=True)
class TargetRow:
    """One layer of the report."""

    name: str  # full name in the model; the parameter's name where a container holds it itself
    type: str  # class of the layer, "Parameter" for one held by a container
    shape: tuple[int, ...]  # of the (first) weight
    parameters: int  # number of values in the layer, biases included
    masked: int  # number of values that get a bit
    reason: str  # "masked", or why not: "norm", "head", "embedding", "excluded", "modules_to_save", "not targeted" …


@dataclass(frozen=True)
class TargetReport:
    """What an adapter masks in a model; `str()` gives the table."""

    rows: tuple[TargetRow, ...]  # one per layer, in the model's order
    total_parameters: int  # values in the model, each once, adapters not counted
    packed_bytes: int  # size of the bit-packed masks, ⌈n/8⌉ per tensor
    note: str = ""  # why nothing is masked, where the architecture has no default

    @property
    def masked_weights(self) -> int:
        """Number of values that get a bit."""
        return sum(row.masked for row in self.rows)

    def __str__(self) -> str:
        """The table and the totals."""
        table = [("module", "type", "shape", "parameters", "masked", "")]
        layers, masked = Counter[str](), Counter[str]()
        for row in self.rows:
            shape = "×".join(map(str, row.shape))
            table.append((row.name, row.type, shape, f"{row.parameters:,}", f"{row.masked:,}", row.reason))
            layers[row.type] += row.masked > 0
            masked[row.type] += row.masked
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        pattern = "  ".join(f"{{:{side}{width}}}" for side, width in zip("<<<>><", widths, strict=True))
        share = self.masked_weights / max(1, self.total_parameters)
        lines = [
            *(pattern.format(*line).rstrip() for line in table),
            "",
            *(
                f"{kind}: {number} layers, {masked[kind]:,} masked weights"
                for kind, number in layers.items()
                if number
            ),
            f"masked: {self.masked_weights:,} of {self.total_parameters:,} parameters ({share:.2%})",
            f"adapter file: {self.packed_bytes / 1e6:.2f} MB packed; "
            f"scores while training: {4 * self.masked_weights / 1e6:.2f} MB (fp32)",
        ]
        return "\n".join([*lines, self.note] if self.note else lines)


def explain_targets(model: nn.Module, config: Any = None, *, verbose: bool = True) -> TargetReport:
    """What would be masked in `model`, per layer and in total, and why the rest is not.

    Args:
        model: A base model, with or without adapters.
        config: A `MaskConfig`, or any object with some of its fields; None shows the architecture's default.
        verbose: Print the report.
    """
    model = base_model_of(model)
    options = ("task_type", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
    match: Any = SimpleNamespace(target_parameters=None, **{name: getattr(config, name, None) for name in options})
    given, note = getattr(config, "target_modules", None), ""
    layers: dict[str, Any] = {name: getattr(match, name) for name in ("layers_to_transform", "layers_pattern")}
    layers["granularity"] = kind = getattr(config, "granularity", "weight")
    try:
        match.target_modules = resolve_targets(model, given, **layers)
    except ValueError as error:  # the report is what the error advises to look at
        match.target_modules, note = [], str(error)
    _maybe_include_all_linear_layers(match, model)
    kind_of = getattr(config, "granularity_of", lambda name: "weight")
    of_units = set(unit_targets(model, kind)) if given is None and kind.endswith("+weight") and not note else None
    heads, seen = head_modules(model), set[int]()
    rows: list[TargetRow] = []
    packed_bytes = 0
    for name, layer in iter_layers(model):
        whole = mask_layer_for(layer) is not None
        named = layer.named_parameters(recurse=whole)
        if not (parameters := {key: value for key, value in named if id(value) not in seen}):
            continue
        seen.update(map(id, parameters.values()))
        kind, reason = type(layer).__name__, _reason(name, layer, match, heads)
        if not whole and not is_norm(layer) and any(True for _ in layer.children()):  # a container's own
            for key, value in parameters.items():
                why = "embedding" if re.search(r"embed|token", key) else reason
                size = tuple(value.shape), value.numel()
                rows.append(TargetRow(f"{name}.{key}".lstrip("."), "Parameter", *size, 0, why))
            continue
        sizes = {key: value.numel() for key, value in parameters.items()}
        rows_too = kind_of(name).startswith("row") and (of_units is None or name in of_units)
        with_biases = getattr(config, "mask_bias", False) or rows_too
        bitless = {"bias_k", "bias_v"} | (set() if with_biases else {"bias", "in_proj_bias"})
        bits = [size for key, size in sizes.items() if reason == "masked" and key.rpartition(".")[2] not in bitless]
        packed_bytes += sum(-(-size // 8) for size in bits)
        shape = next(iter(parameters.values())).shape
        rows.append(TargetRow(name, kind, tuple(shape), sum(sizes.values()), sum(bits), reason))
    report = TargetReport(tuple(rows), sum(row.parameters for row in rows), packed_bytes, note)
    if verbose:
        print(report)
    return report


def _reason(name: str, layer: nn.Module, match: Any, heads: set[int]) -> str:
    """Why a layer is masked or not."""
    form, unsupported = mask_layer_for(layer), f"unsupported type {type(layer).__name__}"
    found = check_target_module_exists(match, name)
    if found:
        return unsupported if form is None else "masked"
    if found is not None and type(found).__name__ == "_ExcludedModule":
        saved = any(re.match(rf"(?:^|.*\.){part}(?:$|\..*)", name) for part in match.modules_to_save or ())
        return "modules_to_save" if saved else "excluded"
    if is_norm(layer):
        return "norm"
    if id(layer) in heads:
        return "head"
    if form is Embedding or "embed" in name:
        return "embedding"
    matrices = any(parameter.ndim > 1 for parameter in layer.parameters(recurse=False))
    return unsupported if form is None and matrices else "not targeted"
