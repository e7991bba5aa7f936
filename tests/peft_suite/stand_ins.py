# SPDX-License-Identifier: Apache-2.0
"""Tiny models of the architectures that PEFT's tests fetch from the Hub, built here with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import AutoModel, PreTrainedConfig

__all__ = ["MODELS", "build"]

_TEXT = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_N = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
_SEQ2SEQ = {"d_model": 16, "vocab_size": 99, "decoder_start_token_id": 0}

# Name of a stand-in: model class, options of its config. The names are those of the Hub models, which tests look at.
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "tiny-random-OPTForCausalLM": (
        "OPTForCausalLM",
        {**_TEXT, **_LAYERS, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
    ),
    "tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", {**_TEXT, **_N}),
    "tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", {**_TEXT, **_N, "rotary_dim": 4}),
    "tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", {**_TEXT, **_LAYERS, "max_position_embeddings": 64}),
    "tiny-random-T5ForConditionalGeneration": (
        "T5ForConditionalGeneration",
        {**_SEQ2SEQ, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
    ),
    "tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        {
            **_SEQ2SEQ,
            **{f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")},
            **{f"{side}_ffn_dim": 24 for side in ("encoder", "decoder")},
            "max_position_embeddings": 64,
        },
    ),
    "tiny-random-BertModel": ("BertModel", {**_TEXT, **_LAYERS}),
    "tiny-random-RobertaModel": ("RobertaModel", {**_TEXT, **_LAYERS}),
    "tiny-random-DebertaV2Model": ("DebertaV2Model", {**_TEXT, **_LAYERS}),
    "tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", {**_TEXT, **_LAYERS}),
    "tiny-random-RobertaForSequenceClassification": ("RobertaForSequenceClassification", {**_TEXT, **_LAYERS}),
    "tiny-random-ResNetForImageClassification": (
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic", "num_labels": 3},
    ),
}


def build(name: str, folder: Path) -> Path:
    """Write a stand-in.

    Args:
        name: A key of [`MODELS`].
        folder: Where to write.

    Returns:
        The model's folder, `folder/name`.
    """
    class_name, options = MODELS[name]
    model_class: type[AutoModel] = getattr(transformers, class_name)
    config: PreTrainedConfig = model_class.config_class(**options)
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder / name)
    if "ResNet" in name:
        transformers.ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(folder / name)
    return folder / name
