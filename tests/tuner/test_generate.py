# SPDX-License-Identifier: Apache-2.0
"""Mixed batches under beam search, which repeats every sample but what an encoder sees."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from smn_peft import MaskConfig

IDS = torch.tensor([[3, 4, 5], [6, 7, 8], [9, 3, 7]])


def decoder() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))


def encoder_decoder() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


@pytest.mark.parametrize(("build", "target"), [(decoder, ["q_proj", "down_proj"]), (encoder_decoder, ["q", "wo"])])
def test_every_beam_has_its_sample_s_adapter(build, target):
    torch.manual_seed(0)
    config = {"target_modules": target, "init_weights": False}
    model = get_peft_model(build(), MaskConfig(seed=1, **config), adapter_name="one").eval()
    model.add_adapter("two", MaskConfig(seed=2, **config))
    names, options = ["one", "two", "one"], {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2}
    together = model.generate(input_ids=IDS, adapter_names=names, **options)
    for row, name in enumerate(names):
        model.set_adapter(name)
        assert torch.equal(model.generate(input_ids=IDS[row : row + 1], **options)[0], together[row])
