# SPDX-License-Identifier: Apache-2.0
"""`smn push`: an adapter to the Hub, with its card and its results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..evaluation import EvalReport
from ..hub import plan_push, push_run

__all__ = ["command"]


def command(
    folder: Annotated[Path, typer.Argument(help="Output folder of `smn train`, or a folder with an adapter.")],
    repo_id: Annotated[str, typer.Argument(metavar="USER/REPO", help="Repository; made where it does not exist.")],
    subfolder: Annotated[
        str | None, typer.Option(help="Folder of this task, in a repository that holds several.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; made where it does not exist.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    message: Annotated[str | None, typer.Option(help="First line of the commit.")] = None,
    license: Annotated[str | None, typer.Option(help="The adapter's licence, such as apache-2.0.")] = None,
    seed_run: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of the same run with another seed, for the card's spread; may be repeated."),
    ] = None,
    reports: Annotated[
        Path | None, typer.Option(help="Evaluations to show in the place of the run's, from `smn eval --json`.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the files and the card, send nothing.")] = False,
) -> None:
    """Push an adapter to the Hugging Face Hub, with a card rendered from the run's records.

    The token is HF_TOKEN, or that of `hf auth login`.
    """
    options: dict[str, Any] = {"subfolder": subfolder, "license": license, "seeds": seed_run or ()}
    if reports is not None:
        options["reports"] = [
            EvalReport.from_json(json.dumps(item)) for item in json.loads(reports.read_text("utf-8"))
        ]
    if dry_run:
        plan = plan_push(folder, repo_id, revision=revision, **options)
        typer.echo(plan.text())
        typer.echo("")
        typer.echo(plan.card())
        return
    info = push_run(
        folder,
        repo_id,
        private=private or None,
        revision=revision,
        create_pr=create_pr,
        commit_message=message,
        **options,
    )
    typer.echo(info.pr_url or info.commit_url)
