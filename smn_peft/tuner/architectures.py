# SPDX-License-Identifier: Apache-2.0
"""What is masked by default in a vision model: the weights of its blocks, never embeddings, norms or the head.

The rules look at a model's structure, not at a list of class names, so they hold for sizes and variants not seen yet:

* **transformers** (attention in numbered blocks): every Linear, attention and convolution inside the blocks; the patch
  embedding is frozen. A regex, so that one adapter's config fits every size of the architecture.
* **convolutional networks**: all convolutions, stem and shortcuts included, and the Linears of numbered stages (the
  MLPs of ConvNeXt). Explicit names.
* **the rest** (MLP-Mixer): every Linear inside the numbered blocks.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from torch import nn

from .kinds import COMPILED, CONVOLUTIONS, iter_layers, kind_of, type_name

__all__ = ["base_model_of", "default_targets", "exact_targets", "head_modules", "matching_names", "vision_scope"]

_LIBRARIES = frozenset({"transformers", "timm", "torchvision", "open_clip", "clip"})
_DENSE = frozenset({"linear", "conv1d_transformers", "attention"})
_TOWERS = ("timm_model", "vision_model", "visual", "trunk")  # TimmWrapper, CLIP and SigLIP, OpenCLIP, its timm towers
_TEXTS = ("text_model", "language_model", "text", "token_embedding")  # beside it; the last two are OpenCLIP's
_TEXT_TOWER = r"(?!(?:.*\.)?(?:text_model|language_model)\.)"
_ATTENTION = re.compile(r"(?:^|[._])(?:\w*attn|\w*attention|qkv|[qkv]_proj|quer(?:y|ies))(?:$|[._])")
_NUMBERED = re.compile(r"\d\.")  # a module above the layer is one of a numbered list
_EMBEDDING = re.compile(r"(?:^|\.)(?:\w*embed\w*|stem\w*|cpb_mlp|continuous_position_bias_mlp|rel_pos\w*)\.")
_IMAGE_CHANNELS = 3
_OTHER_TASK = re.compile(r"^(?:decoder|predictor|pre_logits|aux\d?|AuxLogits)(?:\.|$)")
_HEAD_NAMES = frozenset(
    {"head", "heads", "fc", "classifier", "last_linear", "distillation_classifier", "cls_classifier"}
)


def default_targets(model: nn.Module) -> str | list[str]:
    """The default `target_modules` of a model's architecture.

    Args:
        model: A vision model of transformers, timm, torchvision or OpenCLIP (of a model with two towers, the vision
            tower counts), possibly with adapters on it.

    Returns:
        A regex that `re.fullmatch`es the full module names, or a list of full module names.

    Raises:
        ValueError: The architecture is not known, or has nothing that can be masked.
    """
    model = base_model_of(model)
    if not _is_known(model):
        raise ValueError(_unknown(model, "has no default target modules"))
    prefix, core = _vision_core(model)
    heads = head_modules(model)
    layers = {
        name: layer
        for name, layer in iter_layers(core)
        if kind_of(layer) and id(layer) not in heads and not _OTHER_TASK.match(name)
    }
    in_blocks = [name for name in layers if _NUMBERED.search(name) and not _EMBEDDING.search(name)]
    dense = [name for name in in_blocks if kind_of(layers[name]) in _DENSE]
    convolutions = [name for name, layer in layers.items() if kind_of(layer) in CONVOLUTIONS]
    if any(_ATTENTION.search(name) for name in dense):
        stems = {name for name in convolutions if getattr(layers[name], "in_channels", None) == _IMAGE_CHANNELS}
        names = dense + [name for name in in_blocks if name in convolutions and name not in stems]
        return _regex_or_list(model, prefix, names)
    if len(convolutions) > 1:
        return exact_targets(model, [prefix + name for name in convolutions + dense])
    if dense:
        return _regex_or_list(model, prefix, dense)
    raise ValueError(_unknown(model, "has no layer in its blocks that can be masked"))


def base_model_of(model: nn.Module) -> nn.Module:
    """The model inside a `PeftModel` or a compiled one; any other model as it is."""
    unwrap = getattr(model, "get_base_model", None)
    base = unwrap() if callable(unwrap) else model
    base = base if isinstance(base, nn.Module) else model
    return base.get_submodule("_orig_mod") if type_name(base) == COMPILED else base


def head_modules(model: nn.Module, *, by_name: bool = True) -> set[int]:
    """Ids of the modules that make up the classifier.

    Args:
        model: The base model.
        by_name: Count modules named like a head too, where the model does not say itself which module is its head.
    """
    heads: list[nn.Module] = []
    for owner in (model, _vision_core(model)[1]):
        said = [head for getter in ("get_classifier", "get_output_embeddings") for head in _call(owner, getter)]
        # timm names its classifier itself, and may call a feature layer "head" or "fc"
        if by_name and not hasattr(owner, "get_classifier"):
            said += [child for name, child in owner.named_children() if name in _HEAD_NAMES]
        heads += said
    return {id(module) for head in heads for module in head.modules()}


def _call(owner: nn.Module, getter: str) -> list[nn.Module]:
    function = getattr(owner, getter, None)
    try:
        found = function() if callable(function) else None
    except (AttributeError, NotImplementedError, TypeError):
        return []
    return [head for head in (found if isinstance(found, (list, tuple)) else [found]) if isinstance(head, nn.Module)]


def exact_targets(model: nn.Module, names: Iterable[str]) -> str | list[str]:
    """Targets that select exactly these modules.

    PEFT also matches a listed name as a suffix ("conv1" takes "layer1.0.conv1"). Where that would select a module
    that is not listed, the names become a regex, which matches in full.
    """
    chosen = list(names)
    suffixes = tuple(f".{name}" for name in chosen)
    listed = set(chosen)
    if any(name.endswith(suffixes) for name, _ in model.named_modules() if name not in listed):
        return "|".join(re.escape(name) for name in chosen)
    return chosen


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
    body = _generalise(names)
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    two_towers = "vision_model." in prefix or str(model_type).endswith("_vision_model")
    guard = _TEXT_TOWER if two_towers else ""
    for pattern in (rf"{guard}(?:.*\.)?{body}", rf"(?:.*\.)?{re.escape(prefix)}{body}"):
        if set(matching_names(model, pattern)) == wanted:
            return pattern
    return exact_targets(model, [prefix + name for name in names])


def _generalise(names: list[str]) -> str:
    """One regex for names that differ only in the numbers of their blocks."""
    tails: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        *above, leaf = name.split(".")
        parts = [re.sub(r"^(\w*_)?\d+$", lambda found: f"{found[1] or ''}\\d+", part) for part in above]
        first = next((index for index, part in enumerate(parts) if part.endswith(r"\d+")), len(parts) - 1)
        tails[r"\.".join(parts[: first + 1])][r"\.".join(parts[first + 1 :])].add(re.escape(leaf))
    blocks = []
    for block, owners in sorted(tails.items()):
        groups = [
            (rf"{owner}\." if owner else "") + (f"(?:{'|'.join(sorted(leaves))})" if len(leaves) > 1 else min(leaves))
            for owner, leaves in sorted(owners.items())
        ]
        blocks.append(rf"{block}\.(?:{'|'.join(groups)})")
    return blocks[0] if len(blocks) == 1 else f"(?:{'|'.join(blocks)})"


def _unknown(model: nn.Module, problem: str) -> str:
    return (
        f"{type(model).__module__}.{type(model).__qualname__} {problem}. Pass target_modules=…: a list of module "
        "names, a regex, 'all-linear' or 'all-conv'; explain_targets(model) lists what can be masked."
    )
