# SPDX-License-Identifier: Apache-2.0
"""`model.push_to_hub` of a model with masks brings the package's card; of any other model it is PEFT's own."""

from __future__ import annotations

import copy

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model

from smn_peft import MaskConfig
from smn_peft._push_to_hub import register
from smn_peft.hub import HubError
from tests.hub.folders import X, base, code_of, masked


def outputs(model) -> torch.Tensor:
    with torch.no_grad():
        return model(X)


def test_the_card_tells_what_has_to_be_imported(hub):
    model = masked()
    model.push_to_hub("user/one", commit_message="One mask", commit_description="of one", tags=["toy"], private=True)
    repository = hub.repositories["user/one"]
    assert repository.private
    assert repository.messages[repository.refs["main"]] == "One mask"
    card = ModelCard(hub.tree("user/one")["README.md"].decode())
    assert card.data.library_name == "peft"
    assert {"smn", "toy"} <= set(card.data.tags)
    assert code_of(str(card)).startswith("import smn_peft  # ")
    assert f"{100 * model.base_model.density():.2f} % of the masked weights stay on" in str(card)
    assert f"{4 * sum(p.numel() for p in base().parameters()):,}" in str(card)
    back = PeftModel.from_pretrained(base(), "user/one").eval()
    assert torch.equal(outputs(back), outputs(model))


def test_several_adapters_lie_in_folders_of_their_names(hub):
    model = masked()
    model.add_adapter("pets", MaskConfig(target_modules=["0", "2"], init_weights=False, seed=1))
    model.push_to_hub("user/several", revision="dev", max_shard_size="1GB")
    tree = hub.tree("user/several", "dev")
    assert {"README.md", "adapter_config.json", "pets/README.md", "pets/adapter_model.safetensors"} <= set(tree)
    assert "[pets](pets)" in tree["README.md"].decode()
    assert "A mask adapter for PEFT" in tree["README.md"].decode()
    model.set_adapter("pets")
    back = PeftModel.from_pretrained(base(), "user/several", subfolder="pets", revision="dev").eval()
    assert torch.equal(outputs(back), outputs(model.eval()))


def test_refusals_and_a_pull_request(hub):
    with pytest.raises(ValueError, match="is no repository name"):
        masked().push_to_hub("a/b/c")
    with pytest.raises(HubError, match="log in by"):
        masked().push_to_hub("user/x", token="hf_wrong")
    masked().push_to_hub("user/x")
    info = masked(1).push_to_hub("user/x", create_pr=True)
    assert info.pr_url.endswith("/user/x/discussions/1")


def test_other_methods_keep_peft_s_own(hub):
    model = get_peft_model(base(), LoraConfig(target_modules=["0"]))
    model.push_to_hub("user/lora")
    assert "smn" not in hub.tree("user/lora")["README.md"].decode()
    copied = copy.deepcopy(masked())
    copied.push_to_hub("user/copied")
    assert "import smn_peft" in hub.tree("user/copied")["README.md"].decode()


def test_registering_again_changes_nothing():
    before = PeftModel.push_to_hub
    register()
    assert PeftModel.push_to_hub is before
