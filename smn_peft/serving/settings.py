# SPDX-License-Identifier: Apache-2.0
"""`Settings`: what a server is started with, on the command line or in environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields

from .._options import check_options, describe, from_words, get_type_hints, is_list, option

__all__ = ["Settings"]

_PREFIX = "SMN_SERVE_"


@dataclass(frozen=True)
class Settings:
    """What `smn serve` takes beside the address; each has an environment variable, SMN_SERVE_BANK and so on."""

    bank: str  # folder or file of a bank, user/name on the Hub, a URL; or folder of adapters
    base: str  # Hub id, timm name, folder, or file.py:function
    weights: str | None = option(None, "safetensors file for a timm architecture.")
    image_size: int | None = option(None, "Side of the images in pixels.", least=1)
    head: str = option("head", "Where adapters have their head; in plain timm models fc, …")
    device: str = option("cpu", "Where the model is: cpu, cuda, …")
    api_key_env: str | None = option(None, "Environment variable with the key for changes; none are taken without.")
    max_batch: int = option(32, "Images in one forward.", least=1)
    max_wait_ms: float = option(5.0, "How long an image waits for others.", least=0, most=60_000)
    queue: int = option(256, "Images held at a time; more are answered with 429.", least=1)
    timeout: float = option(30.0, "Seconds that a request may take.", least=0.001, most=86_400)
    grace: float = option(10.0, "Seconds to finish what is under way at the end.", least=0.001, most=86_400)
    ram_budget: int = option(1024, "MiB that decoded tasks may take.", least=0)
    refresh: float = option(60.0, "Seconds between looks at whether a bank of a URL or the Hub has changed.", least=1)
    allowed_hosts: tuple[str, ...] = option((), "Name that clients call the server by; repeatable, '*': any.")

    def __post_init__(self) -> None:
        check_options(self)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Read the variables that are set, lists with spaces between words. ValueError names one that is wrong."""
        environment = os.environ if environment is None else environment
        hints, found = get_type_hints(cls), {}
        for name in (each.name for each in fields(cls)):
            variable = f"{_PREFIX}{name.upper()}"
            if (text := environment.get(variable)) is None:
                if name in ("bank", "base"):
                    raise ValueError(
                        f"The environment variable {variable} is not set: name the server's {name} in it."
                    )
                continue
            try:
                found[name] = from_words(text.split() if is_list(hints[name]) else [text], hints[name])
            except ValueError as error:
                raise ValueError(f"{variable} must be {describe(hints[name])}; got {text!r}.") from error
        return cls(**found)

    def environment(self) -> dict[str, str]:
        """The variables that [`from_environment`] reads as these settings."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        words = {name: " ".join(value) if isinstance(value, tuple) else str(value) for name, value in values.items()}
        return {f"{_PREFIX}{name.upper()}": words[name] for name, value in values.items() if value is not None}
