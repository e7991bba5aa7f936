# SPDX-License-Identifier: Apache-2.0
"""`convert`: a mask in the place of a fine-tuned model, from its weights alone, or by its outputs on images."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from .._options import merged
from ..backbones import Classifier
from ..evaluation import library_versions
from ..hub import full_bytes
from ..storage.adapter_file import adapter_sizes
from ..tuner import MaskConfig, MaskLayer
from ..tuner.wrapper import adapter_layers
from .arguments import TrainArguments, as_facts, load_recipe
from .assemble import adapted, load_base
from .run import RunSummary, run
from .saved import load_run

_OF_BASE = ("backbone", "weights", "pretrained", "backbone_revision", "image_size", "seed")


def load_teacher(folder: str | Path, backbone: str | None = None) -> tuple[Classifier, TrainArguments]:
    """Load the classifier of a finished run other than a mask's (all weights fine-tuned, LoRA …), and its arguments.

    Raises:
        ValueError: The run has a mask, or no head.
    """
    arguments, loaded = load_run(folder, backbone=backbone)
    model: Any = loaded.model
    if isinstance(model, PeftModel):
        if isinstance(model.active_peft_config, MaskConfig):
            raise ValueError(f"{folder} holds a mask already.")
        model = model.merge_and_unload()
    if arguments is None or not isinstance(model, Classifier):
        raise ValueError(f"{folder} holds no finished run of `smn train` with a head: there are no classes to follow.")
    return model.eval().requires_grad_(False), arguments


def convert(
    folder: str | Path, output_dir: str | Path, values: Mapping[str, Any] | None = None, *, backbone: str | None = None
) -> RunSummary:
    """Make the mask and head whose model is nearest to a fine-tuned one's.

    Without a dataset only the weights count: a weight is off where 0 is nearer to the fine-tuned one than the base's
    is. With a dataset, of which labels are not needed, the mask is trained by the recipe ``distill`` until its logits
    follow those of the fine-tuned model; with labels of the same classes both are evaluated.

    Args:
        folder: Output folder of `smn train` with any `adapt` but ``"mask"``.
        output_dir: Folder to write the adapter to.
        values: Arguments of `TrainArguments`, such as `dataset`, `limit`, `mask` or `max_bytes`.
        backbone: Where the base is now, if not where the run says.

    Returns:
        What was done, as of [`run`]; without a dataset nothing is evaluated.

    Raises:
        ValueError: The run has a mask, or no head; or as [`run`].

    Warns:
        UserWarning: Weights that no mask holds were fine-tuned too, such as norms, and no dataset is given.
    """
    values, (teacher, arguments) = values or {}, load_teacher(folder, backbone)
    base = {name: getattr(arguments, name) for name in _OF_BASE}
    fixed = {"output_dir": str(output_dir), "adapt": "mask", "objective": "distillation"}
    if values.get("dataset"):
        return run(TrainArguments(**merged(load_recipe("distill"), base, values, fixed)), teacher=teacher)
    arguments = TrainArguments(**merged(base, values, fixed, {"dataset": arguments.dataset}))
    loaded = load_base(arguments, teacher.num_classes)
    loaded.model.head.load_state_dict(teacher.head.state_dict())  # type: ignore[union-attr]
    facts = RunSummary.load(folder).arguments
    model: Any = adapted(arguments, loaded, facts.get("classes"))
    if others := set_nearest(model, teacher):
        warnings.warn(
            f"{len(others)} tensors that no mask holds were fine-tuned too, such as {others[0]}: the adapter leaves "
            "them as the base has them. With a dataset the mask is trained to make up for that.",
            stacklevel=2,
        )
    model.save_pretrained(str(output_dir), save_embedding_layers=False)
    summary = RunSummary(
        arguments={**facts, **as_facts(arguments)},
        before={},
        after={},
        loss=None,
        density=model.base_model.density(),
        steps=0,
        seconds=0.0,
        images_per_second=None,
        sizes={**vars(adapter_sizes(output_dir)), "full": full_bytes(model)},
        versions={name: library_versions()[name] for name in ("smn_peft", "torch")},
    )
    summary.save(output_dir)
    return summary


@torch.no_grad()
def set_nearest(model: PeftModel, teacher: Classifier) -> list[str]:
    """Set an adapter's masks to those nearest to other weights: off where ``θ'·θ < θ²/2``, so that 0 is nearer than θ.

    Returns the names of other weights and statistics, but for the head's, that differ from the teacher's.
    """
    adapter, tuned = model.active_adapter, dict(teacher.state_dict())
    base: Any = model.get_base_model()
    taken: set[str] = set()
    for name, layer in adapter_layers(base):
        for slot in layer.slots_of(adapter) if isinstance(layer, MaskLayer) else ():
            own, new = layer.base_tensor(slot), tuned[f"{name}.{slot.path}"]
            layer.set_mask(adapter, slot, new * own >= own.square() / 2)
            taken.add(f"{name}.{slot.path}")
    state = {name.replace(".base_layer.", "."): tensor for name, tensor in base.state_dict().items()}
    rest = (name for name in tuned if name not in taken and not name.startswith("head."))
    return [name for name in rest if not torch.equal(tuned[name], state[name])]
