# SPDX-License-Identifier: Apache-2.0
"""`render_card`: the model card of an adapter, from its facts; nothing on it is typed by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from ..evaluation import format_fraction, markdown_table
from ..storage import atomic_write
from .facts import AdapterFacts, facts_of_folder
from .loading import loading_code
from .names import as_span, as_text, dataset_id, shown_name
from .results import eval_result_files, metric_name, model_index

__all__ = ["CARD_NAME", "merged_with", "own_words", "render_card", "write_card"]

CARD_NAME = "README.md"
_BEGIN = "<!-- smn:begin: rendered from the adapter's records; what stands outside of the two marks is kept -->"
_END = "<!-- smn:end -->"
_MARKED = re.compile(r"<!-- smn:begin\b.*?<!-- smn:end -->", re.DOTALL)
_PEFT_VERSIONS = re.compile(r"\n*### Framework versions\n\n(- PEFT [^\n]*\n?)+")
_TEMPLATE = "[More Information Needed]"
_OURS = ("base_model", "base_model_relation", "datasets", "library_name", "model-index", "pipeline_tag", "tags")
_PAPER = "[Self-Masking Networks for Unsupervised Adaptation](https://arxiv.org/abs/2409.07577)"
_LIMITS = (
    "The mask fits the base weights it was learned on and no others: the adapter holds their fingerprint, and another "
    "base is refused.",
    "`import smn_peft` has to come before PEFT loads the adapter; the Hub's own code snippets do not know that.",
    "It holds the mask, not the scores it came from: training that goes on from it starts at even scores.",
)


def render_card(
    facts: AdapterFacts,
    where: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
) -> ModelCard:
    """The card, its front matter and its text between two marks.

    Args:
        facts: What is known.
        where: Repository or folder that the code loads from.
        subfolder: Folder of the task in the repository.
        revision: Branch that the code loads, None for the default one.
        license: The adapter's licence as the Hub spells it, such as "apache-2.0"; None: the card says that none is
            named.
        tags: Tags to add.
    """
    data = _metadata(facts, license, tags)
    sections = [
        f"# {as_text(facts.title)}\n\n{_opening(facts)}",
        f"## Use\n\n```python\n{loading_code(facts.code, where, subfolder, revision)}\n```",
        _evaluation(facts),
        _sizes(facts),
        _recipe(facts),
        _licence(facts, license),
        "## Limits\n\n" + "\n".join(f"- {limit}" for limit in [*map(as_text, facts.notes), *_LIMITS]),
        f"The method: {_PAPER} (Warmerdam, Caron and Asano, GCPR 2024), by `smn_peft`.",
    ]
    body = "\n\n".join([_BEGIN, *(section for section in sections if section), _END])
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def merged_with(card: ModelCard, existing: str | None) -> str:
    """The card as text, with what an earlier README.md has outside of the marks and in fields that are not ours.

    Args:
        card: Of [`render_card`].
        existing: The README.md there is; an unfilled template of PEFT or transformers counts as none.

    Raises:
        ValueError: The front matter of `existing` is not YAML.
    """
    words = own_words(existing)
    if existing is None or not words:
        return str(card)
    old = _parsed(existing)
    for name, value in old.data.to_dict().items():
        if name not in _OURS and card.data.get(name) is None:
            card.data[name] = value
    text, rendered = _PEFT_VERSIONS.sub("\n", old.text), card.text.strip("\n")
    kept = _MARKED.sub(lambda _: rendered, text) if _MARKED.search(text) else f"\n{words}\n\n{rendered}\n"
    return f"---\n{card.data.to_yaml()}\n---\n{kept}"


def own_words(existing: str | None) -> str:
    """What somebody wrote into a README.md: without front matter, rendered parts and unfilled templates."""
    if existing is None or (_TEMPLATE in existing and not _MARKED.search(existing)):
        return ""
    return _MARKED.sub("", _PEFT_VERSIONS.sub("\n", _parsed(existing).text)).strip()


def _parsed(text: str) -> ModelCard:
    try:
        return ModelCard(text.replace("\r\n", "\n"), ignore_metadata_errors=True)
    except (YAMLError, ValueError) as error:
        raise ValueError(f"The lines between --- at the top of {CARD_NAME} are no metadata: {error}") from error


def write_card(folder: str | Path) -> None:
    """Write README.md and `.eval_results/` of an adapter's folder, from the records in it.

    Raises:
        FileNotFoundError: There is no adapter.
        ValueError: A record is damaged.
    """
    folder = Path(folder)
    facts = facts_of_folder(folder)
    card = folder / CARD_NAME
    existing = card.read_text("utf-8") if card.is_file() else None
    files = {CARD_NAME: merged_with(render_card(facts, folder.resolve().name), existing).encode()}
    for name, content in {**files, **eval_result_files(facts.reports)}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        with atomic_write(folder / name) as file:
            file.write(content)


def _metadata(facts: AdapterFacts, license: str | None, tags: Sequence[str]) -> ModelCardData:
    found = ["smn", "mask", *(["base_model:adapter:" + facts.base_id] if facts.base_id else []), *tags]
    dataset = dataset_id(facts.dataset)
    classifies = any(report.metric == "accuracy" for report in facts.reports)
    return ModelCardData(
        base_model=facts.base_id,
        base_model_relation="adapter" if facts.base_id else None,
        library_name="peft",
        license=license,
        pipeline_tag="image-classification" if classifies else "image-feature-extraction",
        tags=list(dict.fromkeys(found)),
        datasets=[dataset] if dataset else None,
        model_name=" ".join(facts.title.split()) if facts.reports else None,
        eval_results=model_index(facts.reports) or None,
    )


def _link(name: str, address: str | None) -> str:
    return f"[{as_text(name)}](https://huggingface.co/{address})" if address else as_span(name)


def _opening(facts: AdapterFacts) -> str:
    base = "a base model that its config does not name"
    if facts.base:
        base = "the frozen " + _link(facts.base, facts.base_id)
        base += f" at revision {as_span(facts.base_revision)}" if facts.base_revision else ""
    words = f"A mask adapter for PEFT: one bit per masked weight of {base} says whether the weight stays on."
    if facts.dataset:
        dataset = dataset_id(facts.dataset)
        shown = _link(shown_name(facts.dataset), f"datasets/{dataset}" if dataset else None)
        shown += f" at revision {as_span(facts.dataset_revision)}" if facts.dataset_revision else ""
        words += f" Learned on {shown}" + (f" by {as_span(facts.objective)}." if facts.objective else ".")
    words += f" The file has {facts.sizes.total:,} bytes"
    if facts.full_bytes:
        words += f", {100 * facts.sizes.total / facts.full_bytes:.1f} % of a checkpoint of all weights"
    if facts.density is not None:
        words += f"; {100 * facts.density:.2f} % of the masked weights stay on"
    return words + "."


def _evaluation(facts: AdapterFacts) -> str:
    """Before and after, in percent; the spread is the standard deviation over the seeds."""
    if not facts.reports:
        return "## Evaluation\n\nNo evaluation was recorded."
    reports = [*facts.baselines, *facts.reports]
    parts = dict.fromkeys((shown_name(report.dataset), report.split) for report in reports)
    columns: dict[str, dict[str, str]] = {}
    for report in reports:
        words = as_text(metric_name(report))
        if len(parts) > 1:
            words += f", {as_text(shown_name(report.dataset))} ({as_text(report.split)})"
        value = format_fraction(report.value, report.spread)
        columns.setdefault(f"{words} %", {}).setdefault(as_text(report.label), value)
    rows = [
        {"": label, **{words: column.get(label, "–") for words, column in columns.items()}}
        for label in dict.fromkeys(as_text(report.label) for report in reports)
    ]
    seeds = max(len(report.seeds) for report in facts.reports)
    spread = f"Mean and standard deviation over {seeds} seeds." if seeds > 1 else "One run; no spread is known."
    tested = " and ".join(f"{as_text(dataset)} (split {as_text(split)})" for dataset, split in parts)
    return f"## Evaluation\n\nOn {tested}. {spread}\n\n{markdown_table(rows)}"


def _sizes(facts: AdapterFacts) -> str:
    parts = {"mask": facts.sizes.mask, "head and other modules in full": facts.sizes.head}
    parts |= {"BatchNorm statistics": facts.sizes.statistics, "scores": facts.sizes.scores}
    parts["header"] = facts.sizes.total - sum(parts.values())
    parts = {name: size for name, size in parts.items() if size and facts.sizes.mask}  # else the split is not known
    parts["the file"] = facts.sizes.total
    if facts.full_bytes:
        parts["full fine-tuning, all weights"] = facts.full_bytes
    rows = [{"part": name, "bytes": f"{size:,}"} for name, size in parts.items()]
    if facts.full_bytes:
        for row, size in zip(rows, parts.values(), strict=True):
            row["of full"] = f"{100 * size / facts.full_bytes:.2f} %"
    return f"## Size\n\n{markdown_table(rows)}"


def _recipe(facts: AdapterFacts) -> str:
    if not facts.recipe:
        return ""
    table = markdown_table(
        [{"option": as_span(name), "value": as_text(value)} for name, value in facts.recipe.items()]
    )
    versions = _listed(facts.versions)
    return f"## How it was learned\n\n{table}" + (f"\n\nWith {versions}." if versions else "")


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(as_text(f"{name} {version}") for name, version in versions.items())


def _licence(facts: AdapterFacts, license: str | None) -> str:
    own = f"The adapter: {license}." if license else "Whoever published the adapter named no licence."
    return (
        f"## Licence\n\n{own} Base model and dataset have licences of their own, which hold for what is made of them."
    )
