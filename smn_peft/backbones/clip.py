# SPDX-License-Identifier: Apache-2.0
"""CLIP: class embeddings from its text tower, the sentences that they are made of, and the keys of its adapters."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import check_loading
from .load import explained, read_config

__all__ = ["DEFAULT_TEMPLATES", "TEMPLATES", "clip_key_mapping", "templates_for", "text_embeddings"]

BATCH = 256  # sentences per forward of the text tower
DEFAULT_TEMPLATES: tuple[str, ...] = ("a photo of a {}.",)

_CIFAR = ("a photo of a {}.", "a blurry photo of a {}.", "a low contrast photo of a {}.", "a photo of the {}.")

#: Of OpenAI's public prompts for CLIP, those that name the dataset's kind of image; keys as in the data registry.
TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "dtd": tuple(f"a photo of a {{}} {what}." for what in ("texture", "pattern", "thing", "object")),
    "eurosat": tuple(f"a centered satellite photo of {name}." for name in ("{}", "a {}", "the {}")),
    "flowers102": ("a photo of a {}, a type of flower.",),
    "pets": ("a photo of a {}, a type of pet.",),
    "sun397": ("a photo of a {}.", "a photo of the {}."),
    "ucf101": tuple(f"a photo of a person {what}{{}}." for what in ("", "doing ", "during ", "practicing ")),
    "food101": ("a photo of {}, a type of food.",),
    "inatloc500": DEFAULT_TEMPLATES,
}


def templates_for(dataset: str) -> tuple[str, ...]:
    """The dataset's templates; for any other name the default, "a photo of a {}."."""
    return TEMPLATES.get(dataset, DEFAULT_TEMPLATES)


def check_templates(templates: Iterable[str]) -> list[str]:
    """Check that there are templates and that each has one "{}" and no other brace."""
    if isinstance(templates, str):
        raise ValueError(f"templates is one string: pass a list, [{templates!r}].")
    if not (checked := list(templates)):
        raise ValueError(f"There are no templates: pass at least one, such as {DEFAULT_TEMPLATES[0]!r}.")
    for template in checked:
        if "{}" not in template or set("{}") & set(template.replace("{}", "", 1)):
            raise ValueError(f"A template needs exactly one {{}}, where the class name goes; got {template!r}.")
    return checked


@torch.no_grad()
def text_embeddings(
    name: str | os.PathLike[str],
    class_names: Sequence[str],
    templates: Iterable[str] = DEFAULT_TEMPLATES,
    *,
    revision: str | None = None,
) -> tuple[Tensor, float]:
    """Embed each class by its sentences: every sentence normalised, averaged over templates, normalised again.

    Args:
        name: A CLIP of transformers with both towers ("openai/clip-vit-base-patch32"), or a folder with its files.
        class_names: Names of the classes, in the order of the labels.
        templates: Sentences with one "{}" each; `clip.templates_for(dataset)` gives a dataset's.
        revision: Git revision on the Hub.

    Returns:
        Embeddings (classes, dim), fp32 and of length 1, on the CPU; and the factor that CLIP multiplies cosines by,
        exp of its `logit_scale` (100 in OpenAI's).

    Raises:
        ValueError: For a checkpoint that is not CLIP's, no or repeated class names, a bad template, or a sentence
            longer than the tower takes.
        OSError: The files are not in the cache and the Hub cannot be reached.
    """
    name, templates, class_names = os.fspath(name), check_templates(templates), list(class_names)
    if not class_names:
        raise ValueError("class_names is empty: a zero-shot head needs the name of every class.")
    if repeated := sorted({name for name in class_names if class_names.count(name) > 1}):
        raise ValueError(f"class_names repeats {', '.join(map(repr, repeated[:5]))}: two classes would be one.")
    model, tokenizer = _load(name, revision)
    # Labels of datasets have underscores ("golden_retriever").
    words = [class_name.replace("_", " ") for class_name in class_names]
    sentences = [template.replace("{}", word) for word in words for template in templates]
    limit = model.config.text_config.max_position_embeddings
    parts = []
    for start in range(0, len(sentences), BATCH):
        batch = sentences[start : start + BATCH]
        tokens = tokenizer(batch, padding=True, return_tensors="pt")
        if tokens["input_ids"].shape[1] > limit:
            longest = int(tokens["attention_mask"].sum(1).argmax())
            raise ValueError(f"{name} takes {limit} tokens at most, too few for {batch[longest]!r}: shorten it.")
        pooled = model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        parts.append(F.normalize(model.text_projection(pooled), dim=1))
    each = torch.cat(parts).view(len(class_names), len(templates), -1)
    return F.normalize(each.mean(1), dim=1), float(model.logit_scale.exp())


def _load(name: str, revision: str | None) -> tuple[Any, Any]:
    """The model in fp32, whole since `logit_scale` belongs to neither tower, and its tokenizer."""
    import transformers

    config = read_config(name, revision)
    if config.model_type != "clip":
        kind = config.model_type
        raise ValueError(f"{name} ({kind}) is not a CLIP with a text tower, such as 'openai/clip-vit-base-patch32'.")
    clip: Any = transformers.CLIPModel
    try:
        model, info = clip.from_pretrained(
            name, config=config, revision=revision, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
        auto: Any = transformers.AutoTokenizer
        tokenizer = auto.from_pretrained(name, revision=revision, trust_remote_code=False)
    except OSError as error:
        raise explained(error, name) from error
    check_loading(info, name)
    del model.vision_model
    return model.eval(), tokenizer


def clip_key_mapping(model: nn.Module) -> dict[str, str]:
    """Make the `key_mapping` of `PeftModel.from_pretrained` with which an adapter of any CLIP vision class loads.

    `CLIPVisionModel` has its encoder at ``encoder`` in transformers 5 and at ``vision_model.encoder`` in transformers
    4 and in `CLIPModel`.

    Args:
        model: The base model that the adapter is to be loaded on.
    """
    whole = any(name == "vision_model.encoder" for name, _ in model.named_modules())
    return {r"^(?:vision_model\.)?encoder\.": "vision_model.encoder." if whole else "encoder."}
