# SPDX-License-Identifier: Apache-2.0
"""Class embeddings from CLIP's text tower, for a zero-shot head; the tower is loaded, used once and freed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .load import explained, read_config
from .prompts import DEFAULT_TEMPLATES, check_templates, fill

__all__ = ["text_embeddings"]


@torch.no_grad()
def text_embeddings(
    name: str | os.PathLike[str],
    class_names: Sequence[str],
    templates: Iterable[str] = DEFAULT_TEMPLATES,
    *,
    revision: str | None = None,
    batch_size: int = 256,
) -> tuple[Tensor, float]:
    """Embed each class by its sentences: every sentence normalised, averaged over templates, normalised again.

    Args:
        name: A CLIP of transformers with both towers ("openai/clip-vit-base-patch32"), or a folder with its files.
        class_names: Names of the classes, in the order of the labels.
        templates: Sentences with one "{}" each; `prompts.templates_for(dataset)` gives a dataset's.
        revision: Git revision on the Hub.
        batch_size: Sentences per forward of the text tower.

    Returns:
        Embeddings (classes, dim), fp32 and of length 1, on the CPU; and the factor that CLIP multiplies cosines by,
        exp of its `logit_scale` (100 in OpenAI's).

    Raises:
        ValueError: For a checkpoint that is not CLIP's, no or repeated class names, a bad template, or a sentence
            longer than the tower takes.
        OSError: The files are not in the cache and the Hub cannot be reached.
    """
    name, templates, class_names = os.fspath(name), check_templates(templates), list(class_names)
    _check_names(class_names)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    model, tokenizer = _load(name, revision)
    sentences = [fill(template, class_name) for class_name in class_names for template in templates]
    limit = model.config.text_config.max_position_embeddings
    parts = []
    for start in range(0, len(sentences), batch_size):
        batch = sentences[start : start + batch_size]
        tokens = tokenizer(batch, padding=True, return_tensors="pt")
        if tokens["input_ids"].shape[1] > limit:
            longest = int(tokens["attention_mask"].sum(1).argmax())
            raise ValueError(f"{name} takes {limit} tokens at most, too few for {batch[longest]!r}: shorten it.")
        pooled = model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        parts.append(F.normalize(model.text_projection(pooled), dim=1))
    each = torch.cat(parts).view(len(class_names), len(templates), -1)
    return F.normalize(each.mean(1), dim=1), float(model.logit_scale.exp())


def _check_names(class_names: list[str]) -> None:
    if not class_names:
        raise ValueError("class_names is empty: a zero-shot head needs the name of every class.")
    if repeated := sorted({name for name in class_names if class_names.count(name) > 1}):
        raise ValueError(f"class_names repeats {', '.join(map(repr, repeated[:5]))}: two classes would be one.")


def _load(name: str, revision: str | None) -> tuple[Any, Any]:
    """The model in fp32, whole since `logit_scale` belongs to neither tower, and its tokenizer."""
    import transformers

    from .settings import check_loading

    config = read_config(name, revision)
    if config.model_type != "clip":
        raise ValueError(
            f"{name} ({config.model_type}) is not a CLIP with a text tower: name one such as "
            "'openai/clip-vit-base-patch32'."
        )
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
