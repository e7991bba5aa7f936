# SPDX-License-Identifier: Apache-2.0
"""`load_backbone`: from a name to a model, over transformers, timm, folders and safetensors files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._options import did_you_mean
from ..storage.files import check_regular
from . import from_timm, from_transformers
from .backbone import Backbone, completed

__all__ = ["explained", "load_backbone", "read_config"]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_CONVERT = (
    "Weights are read from safetensors only, since a pickle can run code. Where you trust the file, convert it: "
    "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')."
)


def load_backbone(
    name: str | os.PathLike[str],
    *,
    pretrained: bool = True,
    image_size: int | None = None,
    state_dict: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    projection: bool = False,
    **kwargs: Any,
) -> Backbone:
    """Load a pretrained vision model without its classifier.

    Args:
        name: A transformers id ("google/vit-base-patch16-224"; of "openai/clip-vit-base-patch32" the vision tower), a
            timm id ("timm/resnet50.a1_in1k", "resnet50", "hf-hub:timm/resnet50.a1_in1k"), or a folder written by a
            transformers model's `save_pretrained`.
        pretrained: False gives random weights, and a model without `name_or_path`.
        image_size: Another input size than the model's own. Position embeddings are resampled: timm's once, while
            loading; those of transformers in every forward.
        state_dict: Weights for the timm architecture `name`: a safetensors file, or tensors by name. fp16 is cast to
            fp32 and a classifier dropped; everything else must fit.
        dtype: Type of the weights, fp32 by default.
        revision: Git revision on the Hub.
        projection: Take the vision tower of CLIP with its projection into the space it shares with text.
        kwargs: Arguments of `timm.create_model`, or of transformers' `from_pretrained`.

    Raises:
        ValueError: Unknown name, pickled weights, or weights or image size that do not fit.
        OSError: The files are not in the cache and the Hub cannot be reached.
    """
    if "num_classes" in kwargs:
        raise ValueError("A backbone has no classifier: put a head of num_classes on its feature_dim features.")
    name = os.fspath(name)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    if state_dict is not None and not isinstance(state_dict, Mapping):
        _check_weights_file(Path(state_dict))
    published = pretrained and state_dict is None
    source, is_timm = _source(name, pretrained=published)
    if state_dict is not None and not is_timm:
        what = f"state_dict needs the name of a timm architecture, not {name!r}"
        raise ValueError(f"{what}: load the weights of a transformers model from a folder with its config.json.")
    config: Any = None
    if not is_timm:
        config = read_config(source, revision)
        is_timm = config.model_type == "timm_wrapper"
    if projection and is_timm:
        raise ValueError(f"{name} is a timm model, which has no projection: projection=True is for CLIP.")
    options = {"image_size": image_size, "dtype": dtype, **kwargs}
    try:
        if not is_timm:
            backbone = from_transformers.load(
                source, config, pretrained=pretrained, revision=revision, projection=projection, **options
            )
        elif published:
            backbone = from_timm.load(source, revision=revision, **options)
        elif config is None:
            backbone = from_timm.create(source, state_dict=state_dict, **options)
        else:
            cfg = getattr(config, "pretrained_cfg", None)
            options = {**(config.model_args or {}), "pretrained_cfg": cfg, **options}
            backbone = from_timm.create(config.architecture, state_dict=None, **options)
    except OSError as error:
        raise explained(error, name) from error
    model: Any = backbone.model
    identity = source if published else name
    model.name_or_path = model.config._name_or_path = identity if published or state_dict is not None else ""
    return completed(backbone, identity, name)


def _source(name: str, *, pretrained: bool) -> tuple[str, bool]:
    """Where a name's files are (Hub id, folder, or timm name if none are needed), and whether it is surely timm's."""
    import timm

    name = name.removeprefix("hf-hub:").removeprefix("hf_hub:")
    if os.path.isdir(name):
        _check_folder(Path(name))
        return name, False
    if name.endswith((*_PICKLES, ".safetensors")):
        fix = "name that, as in load_backbone('<timm architecture>', state_dict=…)"
        raise ValueError(f"{name} holds weights but no architecture: {fix}.")
    architecture = name.removeprefix("timm/")
    if "/" in architecture:
        return name, False
    if not timm.is_model(architecture):
        raise ValueError(f"Unknown backbone {name!r}.{_close_to(name)} A folder must exist, a Hub id has a '/'.")
    if pretrained and name != architecture:
        return name, True
    try:
        config = timm.get_pretrained_cfg(architecture)
    except RuntimeError as error:
        tags = ", ".join(timm.list_pretrained(f"{architecture.partition('.')[0]}.*")[:8])
        raise ValueError(f"timm knows no weights {name!r}; it knows {tags}.") from error
    if not pretrained:
        return architecture, True
    if config is None or not config.hf_hub_id:
        raise ValueError(f"timm has no weights for {name!r}: pass pretrained=False, or your own with state_dict=….")
    return config.hf_hub_id, True


def _check_folder(folder: Path) -> None:
    if (folder / "adapter_config.json").exists():
        fix = "load the base that its config names, then PeftModel.from_pretrained(backbone.model, folder)"
        raise ValueError(f"{folder} holds an adapter, not a backbone: {fix}.")
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} has no config.json: write the folder with model.save_pretrained(folder).")
    names = [path.name for path in folder.iterdir() if path.name != "training_args.bin"]
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise ValueError(f"{folder} holds its weights as a pickle ({pickles[0]}). {_CONVERT}")


def _check_weights_file(path: Path) -> None:
    if path.suffix in _PICKLES:
        raise ValueError(f"{path} is a pickle. {_CONVERT}")
    if path.suffix != ".safetensors":
        raise ValueError(f"state_dict must be a .safetensors file or a mapping of tensors; got {path}.")
    if not path.exists():
        raise FileNotFoundError(f"state_dict: there is no file {path}.")
    check_regular(path)


def read_config(source: str, revision: str | None) -> Any:
    """The transformers config of a Hub id or folder; raises `ValueError` or `OSError` with the remedy."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except OSError as error:
        raise explained(error, source) from error
    except ValueError as error:
        raise ValueError(f"transformers cannot read the config of {source!r}: {error}") from error
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {}]
    for part in (config, *parts):
        kernel = getattr(part, "_attn_implementation", None)
        if isinstance(kernel, str) and "/" in kernel:  # code that transformers would fetch from the Hub and run
            what = f"The config of {source!r} asks for the kernel {kernel!r}, code of the Hub, which is not run"
            raise ValueError(f"{what}: load a copy of the model without attn_implementation in its config.json.")
    return config


def explained(error: OSError, name: str) -> Exception:
    """The same failure with its remedy."""
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    if error.errno is not None:  # the file system's own, such as a full disk
        return error
    text = str(error)
    if "safetensors" in text:
        return ValueError(f"{name} has no safetensors weights. {_CONVERT}")
    causes = (error, error.__cause__, error.__context__)
    if any(isinstance(cause, (LocalEntryNotFoundError, OfflineModeIsEnabled)) for cause in causes):
        why = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "the Hub does not answer"
        fix = "load a folder, or pass state_dict=… with a timm architecture, or pretrained=False for random weights"
        return OSError(f"{name} is not in the local cache and cannot be downloaded ({why}). Go online once, or {fix}.")
    return ValueError(f"Unknown backbone {name!r}: {text.splitlines()[0] if text else error!r}.{_close_to(name)}")


def _close_to(name: str) -> str:
    import timm

    return did_you_mean(name.rpartition("/")[2].lower(), timm.list_models())
