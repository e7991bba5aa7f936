# SPDX-License-Identifier: Apache-2.0
"""`smn serve`: the tasks of a bank over HTTP."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


def _number(value: float) -> float:
    if math.isnan(value):  # which no bound refuses
        raise typer.BadParameter("nan is no number.")
    return value


def command(
    bank: Annotated[Path, typer.Argument(help="Folder of a bank, of an adapter, or of several adapters' folders.")],
    base: Annotated[str, typer.Option(help="Base of the tasks: Hub id, timm name, folder, or file.py:function.")],
    weights: Annotated[Path | None, typer.Option(help="safetensors file for a timm architecture.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side of the images in pixels.")] = None,
    head: Annotated[str, typer.Option(help="Where adapters have their head; in plain timm models fc, …")] = "head",
    device: Annotated[str, typer.Option(help="Where the model is: cpu, cuda, …")] = "cpu",
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the key for changes; none are taken without.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Images in one forward.")] = 32,
    max_wait_ms: Annotated[
        float, typer.Option(min=0, max=60_000, callback=_number, help="How long an image waits for others.")
    ] = 5.0,
    queue: Annotated[int, typer.Option(min=1, help="Images held at a time; more are answered with 429.")] = 256,
    timeout: Annotated[
        float, typer.Option(min=0.001, max=86_400, callback=_number, help="Seconds that a request may take.")
    ] = 30.0,
    grace: Annotated[
        float,
        typer.Option(min=0.001, max=86_400, callback=_number, help="Seconds to finish what is under way at the end."),
    ] = 10.0,
    ram_budget: Annotated[int, typer.Option(min=0, help="MiB that decoded tasks may take.")] = 1024,
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option(help="Name that clients call the server by, beside its address; may be repeated, '*' for any."),
    ] = None,
) -> None:
    """Serve predictions and embeddings of a bank's tasks over HTTP, with a page to try them at /."""
    try:
        from ..serving.app import key_from
        from ..serving.bank import open_bank
        from ..serving.limits import Limits
        from ..serving.server import serve
        from ..serving.service import Service
    except ImportError as error:
        raise ImportError(f'smn serve needs the extra serve ({error.name}): pip install "smn_peft[serve]"') from error
    limits = Limits(queue=queue, timeout=timeout, grace=grace)
    key = key_from(api_key_env)
    opened, backbone, left_out = open_bank(
        bank,
        base,
        weights=weights,
        image_size=image_size,
        head_name=head,
        device=device,
        ram_budget=ram_budget << 20,
        read_only=key is None,
    )
    for name, why in left_out.items():
        typer.echo(f"left out {name}: {why}", err=True)
    typer.echo(f"{len(opened)} tasks over {backbone.name}", err=True)
    service = Service(
        opened, backbone, limits=limits, max_batch=max_batch, max_wait=max_wait_ms / 1000, image_size=image_size
    )
    if warnings := service.warnings():
        name, why = next(iter(warnings.items()))
        typer.echo(f"warning: {len(warnings)} tasks are served otherwise than trained, as {name!r}: {why}", err=True)
    serve(service, host=host, port=port, api_key=key, allowed_hosts=allowed_hosts or ())
