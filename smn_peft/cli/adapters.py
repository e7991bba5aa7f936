# SPDX-License-Identifier: Apache-2.0
"""`smn targets|inspect|verify|pack|unpack|push`: one adapter and its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..backbones import is_file_spec, load_backbone, load_from_file
from ..hub import plan_push, push_run
from ..storage.adapter_config import read_config
from ..storage.adapter_file import adapter_sizes
from ..storage.hub_files import locate_adapter
from ..storage.inspection import inspect_adapter, verify_adapter_file
from ..storage.repack import MAX_UNPACKED, pack_adapter, size_change, unpack_adapter
from ..training.saved import save_run_as, verify_run
from ..tuner import MaskConfig, explain_targets
from .options import PATH, backbone_option, field_options, given, place_options, read_reports

_TARGETS = "target_modules exclude_modules layers_to_transform layers_pattern modules_to_save mask_bias".split()
_out = click.option("--out", "-o", type=PATH, required=True, help="Folder to write.")
_backbone = click.option("--backbone", help="With --base: where it is, if not where the folder says.")


@click.command("targets")
@click.argument("name")
@field_options(MaskConfig, only=_TARGETS)
@click.option("--revision", help="Git revision on the Hub.")
@click.option("--image-size", type=int, help="Side of the images in pixels.")
@click.option("--projection", is_flag=True, help="CLIP's vision tower with its projection.")
@click.pass_context
def targets(
    context: click.Context, name: str, revision: str | None, image_size: int | None, projection: bool, **_: Any
) -> None:
    """Show what would be masked in a model, layer by layer, and how large the adapter would be.

    NAME is a Hub id, timm name, folder, or your own file.py:function. Only the model's shape matters: no weights are
    downloaded.
    """
    if is_file_spec(name):
        if revision or image_size or projection:
            raise ValueError(f"--revision, --image-size and --projection are for libraries' models, not for {name}.")
        model = load_from_file(name).model
    else:
        options: dict[str, Any] = {"revision": revision, "image_size": image_size, "projection": projection}
        model = load_backbone(name, pretrained=False, **options).model
    report = explain_targets(model, MaskConfig(**given(context, MaskConfig)), verbose=False)
    click.echo(str(report))
    if not report.masked_weights:
        raise ValueError("Nothing would be masked: see the last column for what the layers are.")


@click.command("inspect")
@click.argument("adapter")
@place_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(adapter: str, as_json: bool, **place: str | None) -> None:
    """Show density, bits per weight and entropy of each layer, sizes, fingerprint and base of an adapter.

    ADAPTER is a safetensors file, a folder, or user/name on the Hub.
    """
    report = inspect_adapter(locate_adapter(adapter, **place))
    click.echo(report.to_json() if as_json else str(report))


@click.command("verify")
@click.argument("adapter")
@backbone_option
@click.option("--file-only", is_flag=True, help="Check the file alone, without its base.")
@place_options
def verify(adapter: str, backbone: str | None, file_only: bool, **place: str | None) -> None:
    """Check an adapter's checksums, and that its base is the one that its mask was learned on.

    ADAPTER is a folder, a safetensors file, or user/name on the Hub.
    """
    path = locate_adapter(adapter, **place)
    for fact in verify_adapter_file(path):
        click.echo(fact)
    if file_only:
        return
    if not path.is_dir():
        raise ValueError(f"{path} is a file: name its folder to compare it with its base, or add --file-only.")
    click.echo(f"base: {verify_run(path, backbone)}, the one that the mask was learned on")


@click.command("pack")
@click.argument("folder", type=PATH)
@_out
@click.option("--base", is_flag=True, help="Load the base: what selective masking leaves on then costs nothing.")
@_backbone
def pack(folder: Path, out: Path, base: bool, backbone: str | None) -> None:
    """Code an adapter's masks to about their entropy: smaller, exact, and read by PEFT as before."""
    before = adapter_sizes(folder)
    if base or backbone:
        after = save_run_as(folder, out, "entropy", backbone)
    else:
        after = pack_adapter(folder, out)
        if read_config(folder).get("trainable_fraction", 1.0) < 1.0:
            click.echo("Weights that selective masking leaves on were coded too: --base leaves them out.", err=True)
    click.echo(f"{out}: {size_change(before, after)}")


@click.command("unpack")
@click.argument("folder", type=PATH)
@_out
@click.option("--base", is_flag=True, help="Load the base: needed if only the weights that train are coded.")
@_backbone
@click.option("--max-bytes", type=int, default=MAX_UNPACKED, help="Refuse masks that unpack to more bytes.")
def unpack(folder: Path, out: Path, base: bool, backbone: str | None, max_bytes: int) -> None:
    """Write an adapter with one bit per weight, as transformers' own loader wants it."""
    before = adapter_sizes(folder)
    after = save_run_as(folder, out, "bits", backbone) if base or backbone else unpack_adapter(folder, out, max_bytes)
    click.echo(f"{out}: {size_change(before, after)}")


@click.command("push")
@click.argument("folder", type=PATH)
@click.argument("repo_id", metavar="USER/REPO")
@click.option("--subfolder", help="Folder of this task, in a repository that holds several.")
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option("--revision", help="Branch to commit to; made where it does not exist.")
@click.option("--create-pr", is_flag=True, help="Open a pull request.")
@click.option("--message", "commit_message", help="First line of the commit.")
@click.option("--license", help="The adapter's licence, such as apache-2.0.")
@click.option("--seed-run", "seeds", type=PATH, multiple=True, help="Folder of a run with another seed; repeatable.")
@click.option("--reports", type=PATH, help="Evaluations to show in the place of the run's, from `smn eval --json`.")
@click.option("--dry-run", is_flag=True, help="Show the files and the card, send nothing.")
def push(folder: Path, repo_id: str, reports: Path | None, dry_run: bool, **options: Any) -> None:
    """Push an adapter to the Hugging Face Hub, with a card rendered from the run's records.

    FOLDER is an output folder of `smn train`, or a folder with an adapter; the repository is made where it does not
    exist. The token is HF_TOKEN, or that of `hf auth login`.
    """
    shared = {name: options.pop(name) for name in ("subfolder", "license", "seeds", "revision")}
    if reports is not None:
        shared["reports"] = read_reports(reports)
    if dry_run:
        plan = plan_push(folder, repo_id, **shared)
        click.echo(f"{plan.text()}\n\n{plan.card()}")
    else:
        private = options.pop("private") or None  # None leaves a repository that exists as it is
        info = push_run(folder, repo_id, private=private, **options, **shared)
        click.echo(info.pr_url or info.commit_url)
