# SPDX-License-Identifier: Apache-2.0
"""`smn targets|inspect|verify|pack|unpack|slice|push`: one adapter and its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from torch.utils.flop_counter import FlopCounterMode

from .. import storage
from ..backbones import is_file_spec, load_backbone, load_from_file
from ..hub import plan_push, push_run
from ..training.saved import load_run, save_run_as, verify_run
from ..tuner import MaskConfig, explain_targets, save_sliced, slice_model
from .options import PATH, backbone_option, field_options, given, place_options, read_reports

_TARGETS = (
    "target_modules exclude_modules layers_to_transform layers_pattern modules_to_save mask_bias granularity "
    "granularity_pattern"
).split()
_out = click.option("--out", "-o", type=PATH, required=True, help="Folder to write.")
_backbone = click.option("--backbone", help="With --base: where it is, if not where the folder says.")


@click.command("targets")
@click.argument("name")
@field_options(MaskConfig, only=_TARGETS)
@click.option("--revision", help="Git revision on the Hub.")
@click.option("--image-size", type=int, help="Side of the images in pixels.")
@click.option("--projection", is_flag=True, help="CLIP's vision tower with its projection.")
@click.pass_context
def targets(context: click.Context, name: str, **options: Any) -> None:
    """Show what would be masked in a model, layer by layer, and how large the adapter would be.

    NAME is a Hub id, timm name, folder, or your own file.py:function. Only the model's shape matters: no weights are
    downloaded.
    """
    own = {option: options[option] for option in ("revision", "image_size", "projection")}
    if not is_file_spec(name):
        model = load_backbone(name, pretrained=False, **own).model
    elif any(own.values()):
        raise ValueError(f"--revision, --image-size and --projection are for libraries' models, not for {name}.")
    else:
        model = load_from_file(name).model
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
    report = storage.inspect_adapter(storage.locate_adapter(adapter, **place))
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
    path = storage.locate_adapter(adapter, **place)
    for fact in storage.verify_adapter_file(path):
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
    before = storage.adapter_sizes(folder)
    if base or backbone:
        after = save_run_as(folder, out, "entropy", backbone)
    else:
        after = storage.pack_adapter(folder, out)
        if storage.read_config(folder).get("trainable_fraction", 1.0) < 1.0:
            click.echo("Weights that selective masking leaves on were coded too: --base leaves them out.", err=True)
    click.echo(f"{out}: {storage.size_change(before, after)}")


@click.command("unpack")
@click.argument("folder", type=PATH)
@_out
@click.option("--base", is_flag=True, help="Load the base: needed if only the weights that train are coded.")
@_backbone
@click.option("--max-bytes", type=int, default=storage.MAX_UNPACKED, help="Refuse masks that unpack to more bytes.")
def unpack(folder: Path, out: Path, base: bool, backbone: str | None, max_bytes: int) -> None:
    """Write an adapter with one bit per weight, as transformers' own loader wants it."""
    before = storage.adapter_sizes(folder)
    if base or backbone:
        after = save_run_as(folder, out, "bits", backbone)
    else:
        after = storage.unpack_adapter(folder, out, max_bytes)
    click.echo(f"{out}: {storage.size_change(before, after)}")


@click.command("slice")
@click.argument("adapter")
@backbone_option
@click.option("--out", "-o", type=PATH, required=True, help="Safetensors file to write.")
def slice_(adapter: str, backbone: str | None, out: Path) -> None:
    """Cut out of a model what an adapter's mask switches off as a whole, and write the smaller model.

    ADAPTER is an output folder of `smn train`, or the folder of an adapter. `smn_peft.load_sliced` reads the file.
    """
    loaded = load_run(adapter, backbone=backbone)[1]
    images = torch.zeros(1, 3, loaded.image_size, loaded.image_size)
    sliced = slice_model(loaded.model)
    save_sliced(sliced, out)
    before, after = (_cost(model, images) for model in (loaded.model, sliced))
    for what, old, new in zip(("multiplications", "parameters"), before, after, strict=True):
        click.echo(f"{what}: {old:,} -> {new:,} ({new / old:.3f})")
    click.echo(f"{out}: {out.stat().st_size:,} bytes")


def _cost(model: Any, images: torch.Tensor) -> tuple[int, int]:
    """Multiplications of a forward of these images, and parameters, of a model without its adapters."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        base.eval()(images)
    parameters = sum(
        p.numel() for name, p in base.named_parameters() if "smn_" not in name and ".original_module." not in name
    )
    return counter.get_total_flops() // 2, parameters


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
    if reports is not None:
        options["reports"] = read_reports(reports)
    pushed = {name: options.pop(name) for name in ("private", "create_pr", "commit_message")}
    if dry_run:
        plan = plan_push(folder, repo_id, **options)
        click.echo(f"{plan.text()}\n\n{plan.card()}")
    else:
        pushed["private"] = pushed["private"] or None  # None leaves a repository that exists as it is
        info = push_run(folder, repo_id, **pushed, **options)
        click.echo(info.pr_url or info.commit_url)
