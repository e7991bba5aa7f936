# SPDX-License-Identifier: Apache-2.0
"""`extract_features`: a model's features of a whole dataset, un-augmented, over as many processes as there are."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, Dataset

from ..backbones import Backbone, pooled_features
from ..backbones.backbone import EvalTransform
from ..data.loading import PatientLoader, check_map_style
from ..functional.features import require_finite_rows, whole_numbers

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Features", "extract_features"]


@dataclass(frozen=True, eq=False)
class Features:
    """Finite features, or a classifier's logits, of a dataset in its order."""

    features: Tensor  # fp32 (n, dim) on the CPU
    labels: Tensor | None = None  # int64 (n,), where the dataset has some

    def __post_init__(self) -> None:
        """Convert both and check them."""
        if self.features.ndim != 2:
            raise ValueError(f"Features must be (n, dim); got {(*self.features.shape,)}. Pool or flatten them first.")
        object.__setattr__(self, "features", self.features.detach().float().cpu())
        if self.labels is not None:
            if (n := len(self.features),) != self.labels.shape:
                raise ValueError(f"{n} features need as many labels, ({n},); got {tuple(self.labels.shape)}.")
            object.__setattr__(self, "labels", whole_numbers(self.labels.detach().cpu(), "Features"))
        require_finite_rows(self.features, "Features")

    def __len__(self) -> int:
        return len(self.features)

    def subset(self, indices: Tensor) -> Features:
        """The samples at `indices`, in that order."""
        return Features(self.features[indices], None if self.labels is None else self.labels[indices])

    def labels_for(self, what: str) -> Tensor:
        """The labels; a ValueError that `what` needs them if there are none."""
        if self.labels is None:
            raise ValueError(f"{what} needs labels and these features have none: load the dataset with its labels.")
        return self.labels


@dataclass
class Inputs(Dataset[dict[str, Any]]):
    """Transformed images of a dataset, labels where there are some, and keys ("" for none) if `keys`."""

    dataset: Any
    transform: Callable[[Any], Tensor]
    keys: bool = False

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.dataset[index]
        image = item["image"]
        if isinstance(self.transform, EvalTransform) and isinstance(image, Tensor):
            from torchvision.transforms.functional import to_pil_image

            image = to_pil_image(image)  # the model's own library reads PIL images
        label = {} if item.get("label") is None else {"label": int(whole_numbers(item["label"], "An image"))}
        key = {"key": self.dataset.key(index) or ""} if self.keys else {}
        return {"pixel_values": self.transform(image), **label, **key}


def feature_batches(
    model: nn.Module,
    inputs: Inputs,
    batches: Iterable[Sequence[int]],
    *,
    device: torch.device,
    num_workers: int = 0,
    function: Callable[[Tensor], Tensor] | None = None,
    autocast: torch.dtype | None = None,
) -> Generator[dict[str, Any], None, None]:
    """For batches of indices, one after another: their "features" fp32 (batch, dim), and what else `inputs` give.

    The model is in eval mode until the iterator ends or is closed; the rest as in [`extract_features`].
    """
    loader = PatientLoader(
        inputs,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # the loader draws a seed: not from the caller's stream
    )
    run = function or (lambda pixel_values: pooled_features(model, pixel_values))
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for batch in loader:
            pixel_values = batch.pop("pixel_values").to(device, non_blocking=True)
            # Not inference_mode: what a layer caches there could not be used in training.
            with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                features = run(pixel_values).float()
            yield {"features": features, **batch}
    finally:
        for module, mode in modes:
            module.training = mode


def extract_features(
    model: nn.Module | Backbone,
    dataset: Any,
    transform: Callable[[Any], Tensor] | None = None,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    function: Callable[[Tensor], Tensor] | None = None,
    autocast: torch.dtype | None = None,
) -> Features:
    """Features of every sample, in eval mode and in the dataset's order (section 5 of the paper).

    Modes and the random state are restored. Of several processes each takes a share, and all get the whole.

    Args:
        model: Any model that `pooled_features` reads, possibly under an adapter, or a `Backbone`.
        dataset: Map-style; items are ``{"image": uint8 (3, height, width) or PIL image, "label": int or absent}``.
        transform: Image -> (3, size, size) float, without randomness; None takes the `Backbone`'s own.
        batch_size: Images per forward and process.
        num_workers: Processes that read images, per process.
        accelerator: Shares the work among its processes and names the device; None: this process, the model's device.
        function: pixel_values (batch, 3, size, size) -> (batch, dim) in place of `pooled_features`, as a classifier.
        autocast: Type to compute in; None computes in the weights' own, whatever surrounds the call.
    """
    if isinstance(model, Backbone):
        transform = model.transform if transform is None else transform
        model = model.model
    if transform is None:
        raise ValueError("Pass transform=…: only a Backbone knows its own; a bare model does not.")
    check_map_style(dataset)
    if not len(dataset):
        raise ValueError("The dataset is empty: there is nothing to extract features of. Check its split.")
    count, processes, process = len(dataset), 1, 0
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if accelerator is not None:
        processes, process, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    share = -(-count // processes)
    # Beyond the end the last sample fills up, so that every process has as many; the surplus is cut off later.
    indices = [min(index, count - 1) for index in range(share * process, share * (process + 1))]

    def gathered(part: Tensor) -> Tensor:
        """Equally many rows of every process, (processes, rows, …)."""
        whole: Any = accelerator.gather(part.to(device)) if accelerator else part
        return whole.view(processes, *part.shape).cpu()

    batches = BatchSampler(indices, batch_size, drop_last=False)
    options: dict[str, Any] = {"num_workers": num_workers, "function": function, "autocast": autocast}
    found = feature_batches(model, Inputs(dataset, transform), batches, device=device, **options)
    features, labels = [], []
    with closing(found):
        for batch in found:
            features.append(gathered(batch["features"]))
            if "label" in batch:
                labels.append(gathered(batch["label"]))
    return Features(*(torch.cat(parts, dim=1).flatten(0, 1)[:count] for parts in (features, labels) if parts))
