# SPDX-License-Identifier: Apache-2.0
"""`load_from_file`: a user's own model, from a function in a Python file of theirs."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..tuner.config import check_preprocessing
from .backbone import Backbone, completed
from .from_timm import built_size, prepared

__all__ = ["import_file", "is_file_spec", "load_from_file", "name_read_from"]


def is_file_spec(name: str) -> bool:
    """Whether a name means a function in a file ("model.py:build") and not a model of a library."""
    return name.endswith(".py") or ".py:" in name


def name_read_from(where: str | os.PathLike[str], name: str, option: str = "--backbone", first: str = "") -> str:
    """Return the name of a backbone that the file `where`, which may be anybody's, holds; refuse a Python file.

    A function in a Python file is run only if the caller names it, by `option`, after doing what `first` says.
    """
    if is_file_spec(name):
        what = f"{where} names {name!r}, a program, which is run only if you name it yourself"
        fix = f"{first}add {option} {name} (in Python {option.lstrip('-').replace('-', '_')}={name!r})"
        raise ValueError(f"{what}: if you trust it, {fix}.")
    return name


def load_from_file(spec: str) -> Backbone:
    """Run a Python file of the user's and call the function in it that builds the model.

    Only name a file that you trust: it runs as any script does, with its own folder first on the import path.

    Args:
        spec: "path/to/file.py:function". The function takes no arguments and returns an `nn.Module` that maps
            (batch, 3, height, width) to features, or a whole `Backbone`. A module's attributes `mean`, `std` and
            `image_size` say how images are prepared; without them a timm model's own settings count, and for any
            other model ImageNet's, with a warning.

    Returns:
        The model in eval mode; `spec` is its `name`, and its `name_or_path` unless it has one.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file or function fails, there is no such function, or what it returns gives no features.
    """
    path, _, function = spec.rpartition(":")
    if not path.endswith(".py") or not function.isidentifier():
        raise ValueError(f"{spec!r} names no function in a Python file: name it as 'path/to/file.py:function'.")
    module = import_file(path)
    build = getattr(module, function, None)
    if not callable(build):
        own = [
            name
            for name, value in vars(module).items()
            if callable(value) and name[0] != "_" and getattr(value, "__module__", None) == module.__name__
        ]
        there = f" (it has {', '.join(own)})" if own else ""
        raise ValueError(f"{path} has no function {function!r}{there}.")
    with _first_on_path(Path(path)):
        made = _call(build, spec)
    if not isinstance(made, (Backbone, nn.Module)):
        what = "None: does it lack a return?" if made is None else f"a {type(made).__name__}."
        raise ValueError(f"{spec} must return an nn.Module or a Backbone; it returned {what}")
    backbone = made if isinstance(made, Backbone) else _as_backbone(made, spec)
    model: Any = backbone.model
    model.name_or_path = getattr(model, "name_or_path", None) or spec
    return completed(backbone, spec, f"The model of {spec}")


def import_file(path: str | os.PathLike[str]) -> ModuleType:
    """Run a Python file of the user's, with what lies beside it on the import path; ValueError if it fails."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    # A name of its own, that no installed package has: "model.py" must not become `import model` for others.
    name = f"{file.stem}_{hashlib.sha256(os.fsencode(file.resolve())).hexdigest()[:8]}"
    found: Any = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickling look their module up
    try:
        with _first_on_path(file):
            _call(lambda: found.loader.exec_module(module), str(file))
    except ValueError:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _first_on_path(file: Path) -> Iterator[None]:
    """Let a file import what lies beside it, as a script that is run can."""
    before = list(sys.path)
    sys.path.insert(0, str(file.resolve().parent))
    try:
        yield
    finally:
        sys.path[:] = before


def _call(function: Callable[[], Any], what: str) -> Any:
    try:
        return function()
    except (Exception, SystemExit) as error:  # whatever a user's code raises; SystemExit is an example's sys.exit
        kind = "exits" if isinstance(error, SystemExit) else f"raises {type(error).__name__}"
        raise ValueError(f"{what} {kind}: {error}") from error


def _as_backbone(model: nn.Module, spec: str) -> Backbone:
    """The model with how images become its input: what it says itself, else timm's record of it, else ImageNet's."""
    from timm.data import resolve_data_config

    timm_config = getattr(model, "pretrained_cfg", None)
    config = resolve_data_config({}, pretrained_cfg=timm_config or {"crop_pct": 1.0})
    own = {**config, "image_size": built_size(model) or config["input_size"][-1]}
    said = {name: getattr(model, name, None) for name in ("mean", "std", "image_size")}
    if missing := [name for name, value in said.items() if value is None and not timm_config]:
        warnings.warn(
            f"{spec} does not say its model's {', '.join(missing)}: ImageNet's mean and standard deviation and 224 "
            "pixels are taken. Set them as attributes of the module, as in model.mean = (0.5, 0.5, 0.5).",
            stacklevel=3,
        )
    known = {name: own[name] if value is None else value for name, value in said.items()}
    known = {name: v.flatten().tolist() if isinstance(v, torch.Tensor) else v for name, v in known.items()}
    try:
        known = check_preprocessing(known)
    except ValueError as error:
        wrong = str(error).removeprefix("preprocessing: ").partition(";")[0]
        raise ValueError(f"{spec}: {wrong}: correct this attribute of the module.") from error
    return prepared(model, {**config, "mean": known["mean"], "std": known["std"]}, known["image_size"])
