# SPDX-License-Identifier: Apache-2.0
"""`push_run`: an adapter's folder to the Hub in one commit, with its card and its results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard, constants
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import logging

from ..evaluation import EvalReport
from ..storage import CONFIG_NAME, WEIGHTS_NAME, check_adapter_file
from ..tuner import MaskConfig
from ..tuner.config import SMN
from .card import CARD_NAME, merged_with, own_words, render_card
from .collection import collection_card
from .errors import HubError, patiently
from .facts import AdapterFacts, facts_of_folder
from .names import check_repo_id, check_subfolder, hub_id
from .results import eval_result_files

__all__ = ["PushPlan", "full_name", "plan_push", "push_plan", "push_run"]

logger = logging.get_logger(__name__)


@dataclass
class PushPlan:
    """What a push would commit.

    Attributes:
        repo_id: Repository.
        facts: Of each adapter, by its folder in the repository; "" is the root.
        files: Path in the repository -> content or local file.
        notes: What the user may want to know before it is public.
    """

    repo_id: str
    facts: dict[str, AdapterFacts] = field(default_factory=dict)
    files: dict[str, bytes | Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The files with their bytes, and the notes."""
        sizes = {name: len(c) if isinstance(c, bytes) else c.stat().st_size for name, c in self.files.items()}
        lines = [f"{self.repo_id}: {len(sizes)} files, {sum(sizes.values()):,} bytes"]
        lines += [f"{size:>12,}  {name}" for name, size in sorted(sizes.items())]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def card(self) -> str:
        """The card of the first adapter."""
        folder = next(iter(self.facts))
        content = self.files[f"{folder}/{CARD_NAME}" if folder else CARD_NAME]
        assert isinstance(content, bytes)
        return content.decode()


def plan_push(
    folder: str | Path,
    repo_id: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    reports: Sequence[EvalReport] = (),
    seeds: Sequence[str | Path] = (),
    facts: AdapterFacts | None = None,
) -> PushPlan:
    """Check a folder and make everything that a push of it would commit; nothing is sent.

    Of the folder only the adapter goes out: no run.json, no checkpoints, no logs, and no path of this disk.

    Args:
        folder: The output folder of `smn train`, or a folder with an adapter.
        repo_id: Repository, "user/name".
        subfolder: Folder for the adapter in a repository of several tasks.
        revision: Branch, for the card's code.
        license: The adapter's licence as the Hub spells it.
        tags: Tags for the card.
        reports: Evaluations for the card, in the place of those of the run.
        seeds: Folders of the same run with other seeds, for the card's spread.
        facts: What is known of the adapter, if not what the folder says.

    Raises:
        FileNotFoundError: The folder lacks the adapter.
        ValueError: A name is not valid, or a file is damaged, no mask adapter, or a link out of the folder.
    """
    check_repo_id(repo_id)
    check_subfolder(subfolder)
    folder = Path(folder)
    _refuse_links(folder)
    if facts is None:
        facts = facts_of_folder(folder, reports=reports, seeds=seeds)
    check_adapter_file(folder)
    _check_mask(folder)
    plan = PushPlan(repo_id, {subfolder or "": facts})
    prefix = f"{subfolder}/" if subfolder else ""
    branch = None if revision is None or revision.startswith("refs/") else revision
    card = render_card(facts, repo_id, subfolder=subfolder, revision=branch, license=license, tags=tags)
    own = folder / CARD_NAME
    plan.files[prefix + CARD_NAME] = merged_with(card, own.read_text("utf-8") if own.is_file() else None).encode()
    plan.files[prefix + CONFIG_NAME] = _public_config(folder, plan)
    plan.files[prefix + WEIGHTS_NAME] = folder / WEIGHTS_NAME
    plan.files |= eval_result_files(facts.reports, subfolder)
    if license is None:
        plan.notes.append("no licence is named; --license apache-2.0 names one")
    return plan


def push_run(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> CommitInfo:
    """Push an adapter's folder; the repository is made where it does not exist.

    Args:
        folder: The output folder of `smn train`, or a folder with an adapter.
        repo_id: Repository, "user/name".
        private: Make the repository private. An existing public one is refused.
        revision: Branch to commit to, made where it does not exist.
        create_pr: Open a pull request against the main branch and leave that as it is.
        commit_message: First line of the commit.
        token: Token, by default from HF_TOKEN or `hf auth login`.
        options: Of [`plan_push`].

    Returns:
        The commit, with `commit_url`, `oid` and `pr_url`.

    Raises:
        HubError: The Hub refuses or cannot be reached; the message says what to do.
        FileNotFoundError: The folder lacks the adapter.
        ValueError: A name is not valid, or a file is damaged.
    """
    check_repo_id(repo_id)
    if create_pr and revision is not None:
        raise ValueError("A pull request is made against the main branch: leave out the revision, or create_pr.")
    plan = plan_push(folder, full_name(repo_id, token), revision=revision, **options)
    message = commit_message or f"Upload mask {options.get('subfolder') or Path(folder).resolve().name}"
    return push_plan(
        plan, private=private, revision=revision, create_pr=create_pr, commit_message=message, token=token
    )


def push_plan(
    plan: PushPlan,
    *,
    commit_message: str,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_description: str | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """Send a plan in one commit; arguments and errors as of [`push_run`]."""
    api = HfApi(library_name="smn_peft", token=token)
    repo_id = plan.repo_id = patiently(
        lambda: api.create_repo(plan.repo_id, private=private, exist_ok=True), plan.repo_id
    ).repo_id
    info = patiently(lambda: api.model_info(repo_id), repo_id)
    if private and info.private is False:
        raise HubError(
            f"{repo_id} exists and is public: nothing was sent. Choose another name, or make it private on its page."
        )
    if revision is not None and not revision.startswith("refs/"):
        patiently(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True), repo_id)
    # The root's card is shared: with other tasks, and with who edits it on the Hub's page.
    existing, parent = _root_card(api, repo_id, revision)
    files = dict(plan.files)
    root = files.get(CARD_NAME)
    text = existing if root is None else _with_words_of(existing, root)
    tasks = {folder: facts for folder, facts in plan.facts.items() if folder}
    files[CARD_NAME] = collection_card(text, repo_id, tasks, existing).encode()

    def commit(buffered: bool = False) -> CommitInfo:
        contents: dict[str, Any] = {name: _buffer(content) for name, content in files.items()} if buffered else files
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()],
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent,
        )

    try:
        return patiently(commit, repo_id)
    except (HubError, RuntimeError) as error:
        if not _is_of_xet(error):
            raise
        logger.warning(f"Uploading through Xet failed, going on over plain HTTP: {error.__cause__ or error}")
    return patiently(lambda: commit(buffered=True), repo_id)


def _buffer(content: bytes | Path) -> BytesIO:
    """The client sends what it cannot reopen over plain HTTP."""
    return BytesIO(content if isinstance(content, bytes) else content.read_bytes())


def _is_of_xet(error: BaseException) -> bool:
    """Whether hf_xet failed, before anything was committed: it raises Python's own types, the HTTP client its own."""
    cause = error.__cause__ if isinstance(error, HubError) else error
    return not constants.HF_HUB_DISABLE_XET and type(cause).__module__ == "builtins"


def full_name(repo_id: str, token: str | bool | None = None) -> str:
    """The name with the user's own in front where it has none, as the Hub would complete it."""
    if "/" in repo_id:
        return repo_id
    return f"{patiently(HfApi(token=token).whoami, repo_id)['name']}/{repo_id}"


def _root_card(api: HfApi, repo_id: str, revision: str | None) -> tuple[str | None, str | None]:
    """README.md of the branch, None if it has none, and the commit that it is of."""
    sha = patiently(lambda: api.model_info(repo_id, revision=revision), repo_id).sha
    try:
        path = patiently(lambda: api.hf_hub_download(repo_id, CARD_NAME, revision=sha), repo_id)
    except HubError as error:
        if isinstance(error.__cause__, EntryNotFoundError):
            return None, sha
        raise
    return Path(path).read_text("utf-8"), sha


def _refuse_links(folder: Path) -> None:
    """A folder from elsewhere may link to a private file of this disk, which a push would publish."""
    allowed = [folder.resolve(), Path(constants.HF_HUB_CACHE).resolve()]
    for path in (folder / name for name in (CARD_NAME, CONFIG_NAME, WEIGHTS_NAME)):
        target = path.resolve()
        if path.is_symlink() and not any(place in target.parents for place in allowed):
            raise ValueError(
                f"{path} is a link to {target}, outside its folder: put the file itself there to push it."
            )


def _check_mask(folder: Path) -> None:
    kind = json.loads((folder / CONFIG_NAME).read_bytes()).get("peft_type")
    if kind != SMN.value:
        raise ValueError(f"{folder} holds a {kind} adapter, no mask: push it by PEFT's push_to_hub.")
    MaskConfig.from_pretrained(str(folder))  # raises for options that no mask has, and formats of a later release


def _with_words_of(existing: str | None, root: bytes | Path) -> str:
    """The root's card; where nobody wrote into it on this side, with what somebody wrote on the Hub."""
    assert isinstance(root, bytes)
    text = root.decode()
    return text if own_words(text) else merged_with(ModelCard(text), existing)


def _public_config(folder: Path, plan: PushPlan) -> bytes:
    """The config's bytes; a base that is a path on this disk is nobody else's, and is left out."""
    content = (folder / CONFIG_NAME).read_bytes()
    config: Mapping[str, Any] = json.loads(content)
    base = config.get("base_model_name_or_path")
    if not base or hub_id(base) or "/" not in base:
        return content
    plan.notes.append(
        f"the base is a path on this disk ({base}): it is left out, and who loads the adapter has to have the base"
    )
    return json.dumps({**config, "base_model_name_or_path": None}, indent=2, sort_keys=True).encode()
