# SPDX-License-Identifier: Apache-2.0
"""`push_model`: a PEFT model's masks to the Hub, with cards rendered from the model; `PeftModel.push_to_hub` is it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from peft import PeftModel

from .facts import facts_of_folder
from .names import check_repo_id
from .push import PushPlan, full_name, plan_push, push_plan

__all__ = ["full_bytes", "push_model"]


def push_model(
    model: PeftModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: Sequence[str] | None = None,
    license: str | None = None,
) -> CommitInfo:
    """Push every mask adapter of a model, in one commit.

    As in a folder that `save_pretrained` writes, the adapter "default" lies at the root, and every other in a folder
    of its name, to be loaded by ``subfolder=``.

    Args:
        model: With mask adapters only.
        repo_id: Repository, "user/name"; it is made where it does not exist.
        commit_message: First line of the commit.
        commit_description: The rest of it.
        private: Make the repository private. An existing public one is refused.
        token: Token, by default from HF_TOKEN or `hf auth login`.
        revision: Branch to commit to, made where it does not exist.
        create_pr: Open a pull request against the main branch and leave that as it is.
        tags: Tags for the cards.
        license: The adapters' licence as the Hub spells it.

    Raises:
        HubError: The Hub refuses or cannot be reached; the message says what to do.
        ValueError: A name is not valid.
    """
    check_repo_id(repo_id)
    if create_pr and revision is not None:
        raise ValueError("A pull request is made against the main branch: leave out the revision, or create_pr.")
    repo_id = full_name(repo_id, token)
    whole = PushPlan(repo_id)
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary, save_embedding_layers=False)  # "auto" asks the Hub for the base's config
        for name in model.peft_config:
            folder = Path(temporary) if name == "default" else Path(temporary, name)
            base: Any = model.base_model
            facts = facts_of_folder(folder)
            facts = replace(facts, density=base.density(name), full_bytes=full_bytes(model))
            subfolder = None if name == "default" else name
            options: dict[str, Any] = {"subfolder": subfolder, "revision": revision, "license": license}
            plan = plan_push(folder, repo_id, tags=tags or (), facts=facts, **options)
            whole.facts |= plan.facts
            whole.files |= plan.files
        return push_plan(
            whole,
            commit_message=commit_message or f"Upload mask {', '.join(model.peft_config)}",
            commit_description=commit_description,
            private=private,
            revision=revision,
            create_pr=create_pr,
            token=token,
        )


def full_bytes(model: PeftModel) -> int:
    """Bytes of all weights and statistics of the base, heads included: what full fine-tuning would save."""
    own = ("smn_", "lora_", "modules_to_save")
    return sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in model.state_dict().items()
        if not any(part.startswith(own) for part in name.split("."))
    )
