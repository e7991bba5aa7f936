# SPDX-License-Identifier: Apache-2.0
"""`push_run` and `push_model`: adapters to the Hub in one commit, with their cards and results."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import HFValidationError, logging, validate_repo_id
from peft import PeftModel
from torch import nn

from ..evaluation import EvalReport
from ..storage.adapter_config import CONFIG_NAME
from ..storage.adapter_file import WEIGHTS_NAME, parse_adapter_file
from ..storage.files import read_bytes
from ..tuner import MaskConfig
from ..tuner.config import SMN
from .card import CARD_NAME, collection_card, eval_result_files, merged_with, own_words, read_card, render_card
from .facts import AdapterFacts, facts_of_folder, hub_id

_FOLDER = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*")
_BUSY = (429, 503)
_TRIES = 4
_LONGEST = 120.0  # seconds; a longer wait is the user's to decide
_RESET = re.compile(r"\bt\s*=\s*(\d+)")

T = TypeVar("T")
logger = logging.get_logger(__name__)


class HubError(OSError):
    """The Hub refused, or could not be reached; the message says what to do."""


@dataclass
class PushPlan:
    """What a push would commit."""

    repo_id: str
    facts: dict[str, AdapterFacts] = field(default_factory=dict)
    """Of each adapter, by its folder in the repository; "" is the root."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Path in the repository -> content."""
    notes: list[str] = field(default_factory=list)
    """What the user may want to know before it is public."""

    def text(self) -> str:
        """The files with their bytes, and the notes."""
        sizes = {name: len(content) for name, content in self.files.items()}
        lines = [f"{self.repo_id}: {len(sizes)} files, {sum(sizes.values()):,} bytes"]
        lines += [f"{size:>12,}  {name}" for name, size in sorted(sizes.items())]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def card(self) -> str:
        """The card of the first adapter."""
        folder = next(iter(self.facts))
        return self.files[f"{folder}/{CARD_NAME}" if folder else CARD_NAME].decode()


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
    """Check an adapter's folder, as of `smn train`, and make everything that a push would commit; nothing is sent.

    Of the folder only the adapter goes out: no run.json, no checkpoints, no logs, and no path of this disk.

    Args:
        folder: Folder of the adapter.
        repo_id: Repository, "user/name".
        subfolder: Folder for the adapter in a repository of several tasks.
        revision: Branch, for the card's code.
        license: The adapter's licence as the Hub spells it, such as "apache-2.0".
        tags: Tags for the card.
        reports: Evaluations for the card, instead of those of the run.
        seeds: Folders of the same run with other seeds, for the card's spread.
        facts: What is known of the adapter, if not what the folder says.

    Raises:
        FileNotFoundError: The folder lacks the adapter.
        ValueError: A name is not valid, or a file is damaged, no mask adapter, or a link out of the folder.
    """
    _check_repo_id(repo_id)
    if subfolder is not None and not _FOLDER.fullmatch(subfolder):
        wanted = "a task's folder has letters, digits, '-', '_' and '.', each part beginning with a letter or digit"
        raise ValueError(f"subfolder={subfolder!r}: {wanted}, as in cifar100 or vit/cifar100.")
    folder = Path(folder)
    _refuse_links(folder)
    if facts is None:
        facts = facts_of_folder(folder, reports=reports, seeds=seeds)
    weights = read_bytes(folder / WEIGHTS_NAME)
    parse_adapter_file(weights, folder / WEIGHTS_NAME)  # raises if it is damaged
    content = read_bytes(folder / CONFIG_NAME)
    config = json.loads(content)
    if (kind := config.get("peft_type")) != SMN.value:
        raise ValueError(f"{folder} holds a {kind} adapter, no mask: push it by PEFT's push_to_hub.")
    MaskConfig.from_pretrained(str(folder))  # raises for options that no mask has, and formats of a later release
    plan = PushPlan(repo_id, {subfolder or "": facts})
    base = config.get("base_model_name_or_path")
    if base and not hub_id(base) and "/" in base:
        what = f"the base is a path on this disk ({base})"
        plan.notes.append(f"{what}: it is left out, and who loads the adapter has to have the base")
        content = json.dumps({**config, "base_model_name_or_path": None}, indent=2, sort_keys=True).encode()
    if license is None:
        plan.notes.append("no licence is named; --license apache-2.0 names one")
    branch = None if revision is None or revision.startswith("refs/") else revision
    card = render_card(facts, repo_id, subfolder=subfolder, revision=branch, license=license, tags=tags)
    prefix = f"{subfolder}/" if subfolder else ""
    plan.files = {
        prefix + CARD_NAME: merged_with(card, read_card(folder)).encode(),
        prefix + CONFIG_NAME: content,
        prefix + WEIGHTS_NAME: weights,
        **eval_result_files(facts.reports, subfolder),
    }
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
    """Push an adapter's folder; the repository, of the user's own where none is named, is made if it does not exist.

    Args:
        folder: As of [`plan_push`], whose `options` and errors hold too.
        repo_id: Repository, "user/name" or "name".
        private: Make the repository private. An existing public one is refused.
        revision: Branch to commit to, made where it does not exist.
        create_pr: Open a pull request against the main branch and leave that as it is.
        commit_message: First line of the commit.
        token: Token, by default from HF_TOKEN or `hf auth login`.
        options: See `folder`.

    Raises:
        HubError: The Hub refuses or cannot be reached; the message says what to do.
    """
    plan = plan_push(folder, _full_name(repo_id, token, create_pr, revision), revision=revision, **options)
    message = commit_message or f"Upload mask {options.get('subfolder') or Path(folder).resolve().name}"
    return _send(plan, message, private, revision, create_pr, token)


def push_model(
    model: PeftModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: Sequence[str] | None = None,
    license: str | None = None,
    commit_description: str | None = None,
) -> CommitInfo:
    """Push every mask adapter of a model in one commit, as `PeftModel.push_to_hub`, with [`push_run`]'s arguments.

    As `save_pretrained` does, it puts the adapter "default" at the root, and every other into a folder of its name.
    """
    whole = PushPlan(_full_name(repo_id, token, create_pr, revision))
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary, save_embedding_layers=False)  # "auto" asks the Hub for the base's config
        for name in model.peft_config:
            subfolder = None if name == "default" else name
            folder = Path(temporary, subfolder or "")
            base: Any = model.base_model
            facts = replace(facts_of_folder(folder), density=base.density(name), full_bytes=full_bytes(model))
            options: dict[str, Any] = {"revision": revision, "license": license, "tags": tags or (), "facts": facts}
            plan = plan_push(folder, whole.repo_id, subfolder=subfolder, **options)
            whole.facts |= plan.facts
            whole.files |= plan.files
    message = commit_message or f"Upload mask {', '.join(model.peft_config)}"
    return _send(whole, message, private, revision, create_pr, token, commit_description)


def full_bytes(model: nn.Module) -> int:
    """Bytes of all weights and statistics of the base, heads included: what full fine-tuning would save."""
    own = ("smn_", getattr(getattr(model, "base_model", None), "prefix", "smn_"), "modules_to_save")
    return sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in model.state_dict().items()
        if not any(part.startswith(own) for part in name.split("."))
    )


def _send(
    plan: PushPlan,
    message: str,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    token: str | bool | None,
    description: str | None = None,
) -> CommitInfo:
    """Send a plan in one commit; arguments and errors as of [`push_run`]."""
    api, tasks = HfApi(library_name="smn_peft", token=token), {f: facts for f, facts in plan.facts.items() if f}

    def send() -> CommitInfo:
        repo_id = api.create_repo(plan.repo_id, private=private, exist_ok=True).repo_id
        if private and api.model_info(repo_id).private is False:
            fix = "Choose another name, or make it private on its page."
            raise HubError(f"{repo_id} exists and is public: nothing was sent. {fix}")
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        # The root's card is shared with other tasks, and with who edits it on the Hub's page.
        existing, parent = _root_card(api, repo_id, revision)
        files, text = dict(plan.files), existing
        if CARD_NAME in files:
            text = files[CARD_NAME].decode()
            if not own_words(text):  # nobody wrote into it on this side
                text = merged_with(ModelCard(text), existing)
        files[CARD_NAME] = collection_card(text, repo_id, tasks, existing).encode()
        options: dict[str, Any] = {"revision": revision, "create_pr": create_pr, "parent_commit": parent}
        options |= {"commit_message": message, "commit_description": description}
        for wrap in (bytes, BytesIO):  # the client sends streams over plain HTTP
            content = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=wrap(files[name])) for name in files]
            try:
                return api.create_commit(repo_id, content, **options)
            except (OSError, RuntimeError) as error:
                if constants.HF_HUB_DISABLE_XET or isinstance(error, HTTPError) or wrap is BytesIO:
                    raise
                logger.warning(f"Uploading through Xet failed, going on over plain HTTP: {error}")
        raise AssertionError("unreachable")

    return patiently(send, plan.repo_id)


def _full_name(repo_id: str, token: str | bool | None, create_pr: bool, revision: str | None) -> str:
    """Complete a repository's name with the user's own, as the Hub would."""
    _check_repo_id(repo_id)
    if create_pr and revision is not None:
        raise ValueError("A pull request is made against the main branch: leave out the revision, or create_pr.")
    if "/" in repo_id:
        return repo_id
    return f"{patiently(HfApi(token=token).whoami, repo_id)['name']}/{repo_id}"


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no repository name: {error} Write it as user/smn-cifar100.") from error


def _root_card(api: HfApi, repo_id: str, revision: str | None) -> tuple[str | None, str | None]:
    """README.md of the branch, None if it has none, and the commit that it is of."""
    sha = api.model_info(repo_id, revision=revision).sha
    try:
        return Path(api.hf_hub_download(repo_id, CARD_NAME, revision=sha)).read_text("utf-8"), sha
    except LocalEntryNotFoundError:  # the Hub cannot be reached
        raise
    except EntryNotFoundError:
        return None, sha


def _refuse_links(folder: Path) -> None:
    """A folder from elsewhere may link to a private file of this disk, which a push would publish."""
    allowed = [folder.resolve(), Path(constants.HF_HUB_CACHE).resolve()]
    for path in (folder / name for name in (CARD_NAME, CONFIG_NAME, WEIGHTS_NAME)):
        target = path.resolve()
        if path.is_symlink() and not any(place in target.parents for place in allowed):
            raise ValueError(f"{path} is a link to {target}, outside its folder: put the file itself there.")


def patiently(call: Callable[[], T], repo_id: str) -> T:
    """Call the Hub; where it is busy, wait as long as it says and try again, which the client does for uploads alone.

    Only answers that say that nothing was done are tried again. `repo_id` is for messages.

    Raises:
        HubError: The Hub refuses, is busy for longer than two minutes, or cannot be reached.
    """
    for attempt in range(1, _TRIES + 1):
        try:
            return call()
        except (HTTPError, OSError, RuntimeError) as error:
            # The client wraps what ends an upload in a RuntimeError.
            cause: Any = error if isinstance(error, (HTTPError, OSError)) else error.__cause__
            known = isinstance(cause, (HTTPError, OSError))
            if not known or isinstance(cause, (FileNotFoundError, PermissionError, HubError)):
                raise  # a bug, of this disk, or explained already
            wait = _seconds_to_wait(cause)
            if wait is None or wait > _LONGEST or attempt == _TRIES:
                raise HubError(_explanation(cause, repo_id, wait)) from error
            logger.warning(f"The Hub is busy: trying again in {wait:g} seconds ({attempt} of {_TRIES - 1}).")
            time.sleep(wait)
    raise AssertionError("unreachable")


def _seconds_to_wait(error: Exception) -> float | None:
    """Seconds that the Hub asks to wait; None for an answer that will not change."""
    response = getattr(error, "response", None)
    if response is None or response.status_code not in _BUSY:
        return None
    stated, reset = response.headers.get("Retry-After", ""), _RESET.search(response.headers.get("RateLimit", ""))
    return float(stated) if stated.strip().isdigit() else float(reset[1]) if reset else 10.0


def _explanation(error: Exception, repo_id: str, wait: float | None) -> str:
    if not isinstance(error, HfHubHTTPError):
        what = f"The Hub cannot be reached, or the connection broke ({type(error).__name__}: {error})."
        return f"{what} Check the network and push again: what is uploaded already is not sent again."
    status, token = error.response.status_code, "a token with write access (huggingface.co/settings/tokens)"
    said = f" The Hub says: {' '.join(error.server_message.split())}" if error.server_message else ""
    if isinstance(error, RevisionNotFoundError):
        fix = f"{repo_id} has no such revision: name a branch of it, or leave --revision out."
    elif isinstance(error, GatedRepoError):
        fix = f"{repo_id} is gated: ask for access on its page, then push again."
    elif isinstance(error, RepositoryNotFoundError) or status == 404:
        private = "a private repository needs `hf auth login` with an account that may see it"
        fix = f"The Hub shows no {repo_id}: check the spelling of user and name; {private}."
    elif status in _BUSY:
        fix = f"The Hub takes no more requests for now: push again in {wait:g} seconds."
    elif status == 401:
        fix = f"The Hub does not know you: log in by `hf auth login`, or set HF_TOKEN to {token}."
    elif status == 403:
        fix = f"Your token may not write to {repo_id}: take {token}, your own user name, or --create-pr to propose it."
    elif status == 412:
        fix = f"{repo_id} was changed by somebody else meanwhile: push again."
    else:
        fix = f"The Hub answered {status} for {repo_id}." + ("" if said else f" {' '.join(str(error).split())}")
    return fix + said
