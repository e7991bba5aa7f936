# SPDX-License-Identifier: Apache-2.0
"""What takes the place of PEFT's own test cases, and what is left out of its tests, each with the reason."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from smn_peft import MaskConfig

__all__ = ["LEFT_OUT", "LISTS", "TABLES", "reason_to_leave_out"]

# PEFT's tests train for three small steps and expect another output: start close to the threshold.
_CLOSE: dict[str, Any] = {"init_score": 1e-5}
_TOPK: dict[str, Any] = {"mask_type": "topk", "density": 0.5, "init_score": "kaiming_uniform"}

# (name, model of test_custom_models.MockTransformerWrapper, options)
_CUSTOM: list[tuple[str, str, dict[str, Any]]] = [
    ("MLP 1", "MLP", {"target_modules": "lin0"}),
    ("MLP 2", "MLP", {"target_modules": ["lin0"]}),
    ("MLP 3", "MLP", {"target_modules": ["lin1"]}),
    ("MLP 4", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("MLP modules_to_save", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP bias", "MLP", {"target_modules": ["lin0", "lin1"], "mask_bias": True}),
    ("MLP unscaled", "MLP", {"target_modules": ["lin0"], "scale": False}),
    ("MLP threshold", "MLP", {"target_modules": ["lin0"], "threshold": 0.5, "init_score": 0.50001}),
    ("MLP fraction", "MLP", {"target_modules": ["lin0", "lin1"], "trainable_fraction": 0.7}),
    ("MLP largest", "MLP", {"target_modules": ["lin0"], "trainable_fraction": 0.5, "select": "magnitude"}),
    ("MLP scores", "MLP", {"target_modules": ["lin0", "lin1"], "save_scores": True}),
    ("MLP2", "MLP2", {"target_modules": ["lin0", "lin1"]}),
    ("MLP LayerNorm", "MLP_LayerNorm", {"target_modules": ["lin0", "lin1"]}),
    ("Embedding", "EmbConv1D", {"target_modules": ["emb"]}),
    ("Conv1D of transformers", "EmbConv1D", {"target_modules": ["conv1d"]}),
    ("Embedding and Conv1D", "EmbConv1D", {"target_modules": ["emb", "conv1d"]}),
    ("Embedding, saved", "EmbConv1D", {"target_modules": ["conv1d"], "modules_to_save": ["emb"]}),
    ("Conv1d", "Conv1d", {"target_modules": ["conv1d"]}),
    ("Conv1d and Linear", "Conv1d", {"target_modules": ["conv1d", "lin0"]}),
    ("Conv1d bigger", "Conv1dBigger", {"target_modules": ["conv1d"]}),
    ("Conv1d groups", "Conv1dGroups", {"target_modules": ["conv1d"]}),
    ("Conv2d 1", "Conv2d", {"target_modules": ["conv2d"]}),
    ("Conv2d 2", "Conv2d", {"target_modules": ["conv2d", "lin0"], "mask_bias": True}),
    ("Conv2d 3", "Conv2d2", {"target_modules": ["conv2d", "lin0", "lin1"]}),
    ("Conv2d 1x1", "Conv2d1x1", {"target_modules": ["conv2d"]}),
    ("Conv2d groups 1", "Conv2dGroups", {"target_modules": ["conv2d"]}),
    ("Conv2d groups 2", "Conv2dGroups2", {"target_modules": ["conv2d"]}),
    ("Conv2d topk", "Conv2d", {"target_modules": ["conv2d"], **_TOPK}),
    ("Conv3d 1", "Conv3d", {"target_modules": ["conv3d"]}),
    ("Conv3d 2", "Conv3d", {"target_modules": ["conv3d", "lin0"]}),
    ("MHA 1", "MHA", {"target_modules": ["mha"]}),
    ("MHA 2", "MHA", {"target_modules": ["mha", "lin0"]}),
    ("MHA bias", "MHA", {"target_modules": ["mha"], "mask_bias": True}),
]


@dataclass
class Unchecked(MaskConfig):
    """A `MaskConfig` for tests that load an adapter onto another random base than it was made for."""

    check_base: bool = False


def _random(**options: Any) -> MaskConfig:
    return MaskConfig(init_weights=False, **options)


def _pairs() -> list[tuple[str, str, type[MaskConfig], dict[str, Any], dict[str, Any]]]:
    """Two adapters on one model; the second with another seed, or the random masks would be the same."""
    first, other = {"init_weights": False}, {"init_weights": False, "seed": 1}
    linear, last = {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}
    return [
        ("SMN Same", "smn", MaskConfig, linear | first, linear | other),
        ("SMN Different", "smn", MaskConfig, linear | first, last | other),
    ]


def _crossed(task_type: str, names: str, *models: str) -> dict[str, list[Any]]:
    """Configurations and models that are crossed; the models are those of stand_ins.py."""
    options: list[dict[str, Any]] = [
        {"target_modules": ["q_proj", "v_proj", "c_attn", "q", "v", "query", "value", "query_proj", "value_proj"]},
        {
            "target_modules": "all-linear",
            "exclude_modules": r".*pooler.*",  # not run by what the tests call
            "mask_bias": True,
            "save_scores": True,
        },
    ]
    return {
        "ALL_CONFIGS": [(MaskConfig, {**_CLOSE, **option, "task_type": task_type}) for option in options],
        names: [f"models/tiny-random-{model}" for model in models],
    }


# Lists and dicts at the top of PEFT's test files: what stands in them is replaced.
TABLES: dict[str, dict[str, list[Any] | dict[str, Any]]] = {
    "test_custom_models": {
        "TEST_CASES": [(f"{name} SMN", model, MaskConfig, _CLOSE | options) for name, model, options in _CUSTOM],
        "ALL_PEFT_CONFIG_CLASSES": [Unchecked],
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": _pairs(),
        "MIXED_ADAPTER_TEST_CASES": [
            ("SMN mixed", _random(target_modules=["lin0"]), _random(target_modules=["lin0"], seed=1)),
        ],
    },
    "test_decoder_models": _crossed(
        "CAUSAL_LM",
        "PEFT_DECODER_MODELS_TO_TEST",
        "OPTForCausalLM",
        "GPT2LMHeadModel",
        "GPTJForCausalLM",
        "LlamaForCausalLM",
    ),
    "test_encoder_decoder_models": _crossed(
        "SEQ_2_SEQ_LM",
        "PEFT_ENCODER_DECODER_MODELS_TO_TEST",
        "T5ForConditionalGeneration",
        "BartForConditionalGeneration",
    ),
    "test_feature_extraction_models": _crossed(
        "FEATURE_EXTRACTION",
        "PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST",
        "BertModel",
        "RobertaModel",
        "DebertaV2Model",
    ),
    "test_seq_classifier": _crossed(
        "SEQ_CLS",
        "PEFT_SEQ_CLS_MODELS_TO_TEST",
        "BertForSequenceClassification",
        "RobertaForSequenceClassification",
    ),
    "test_vision_models": {
        "CONFIGS": {
            "frozen": MaskConfig(
                target_modules=["convolution"], modules_to_save=["classifier", "normalization"], init_score=1e-4
            ),
            "adapt": MaskConfig(
                target_modules=["convolution"], modules_to_save=["classifier"], batch_norm="adapt", init_score=1e-4
            ),
        },
    },
}

# Lists written into a decorator, by test: every row is replaced.
LISTS: dict[str, list[Any]] = {
    "test_mixed_adapter_batches_different_target_layers": [
        ("SMN mixed", _random(target_modules=["lin0"]), _random(target_modules=["lin1"], seed=1)),
    ],
    "test_mixed_adapter_batches_multiple_modules_to_save": [
        (
            "SMN mixed",
            _random(target_modules=["lin0"], modules_to_save=["lin1"]),
            _random(target_modules=["lin0"], modules_to_save=["lin1"], seed=1),
        ),
    ],
}

# (regex that matches the start of a test's name with its parameters, reason)
LEFT_OUT: list[tuple[str, str]] = [
    (
        r"test_save_pretrained(_selected_adapters)?(_pickle)?\[|test_parameters_after_loading_model",
        "compares state dicts before saving and after loading: scores while training, bits once loaded, by design",
    ),
    (
        r"test_adapter_dtype_autocast\[\w+-False-dtype[01]-|test_add_adapter_no_autocast_adapter_dtype",
        "wants parameters as narrow as the base with autocast_adapter_dtype=False: scores stay fp32, by design",
    ),
    (
        r"test_disable_adapters(_with_merging)?\[Conv2d topk",
        "wants the base's output before training: a topk mask removes weights from the start, by definition",
    ),
    (
        r"test_only_params_are_updated\[MHA bias",
        "wants every score to move: torch starts in_proj_bias at zero, and a mask on zeros has no gradient",
    ),
    (
        r"test_merge_layers_multi",
        "adds one config twice and wants two random adapters: a mask's random numbers come from its config's seed",
    ),
    (
        r"layer_indexing\[.*-config_kwargs1-",
        "passes layers_to_transform with 'all-linear', which PEFT ignores in silence and a mask config refuses",
    ),
    (
        r"test_from_pretrained_config_construction",
        "wants the model to hold the caller's config itself: it holds a copy, in which it resolves the targets",
    ),
]


def reason_to_leave_out(name: str) -> str | None:
    """Why a test, by `Class.function[parameters]`, cannot hold for a mask adapter; None if it has to."""
    return next((reason for pattern, reason in LEFT_OUT if re.search(pattern, name)), None)
