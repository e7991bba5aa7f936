# SPDX-License-Identifier: Apache-2.0
"""Self-masking networks in one sitting: scores, straight-through, σ, training, one bit per weight, loading.

Nothing here comes from the package, which learns the same masks to the bit (a test holds that). A small convolutional
network learns the digits 0–4; a mask over its frozen weights, and a new head, then learn the digits 5–9. The paper's
networks and images are larger, its method is this.
"""

import copy
import tempfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F


def effective_weight(weight: Tensor, scores: Tensor) -> Tensor:
    """θ · M / σ (Eq. 1), with M = 1[S > 0] and σ = sqrt(active / N), one σ per tensor.

    Forward, the mask is zeros and ones. Backward, the scores get the gradient of the mask as it is: the
    straight-through estimator. σ is a part of the graph.
    """
    mask = (scores > 0).float() + (scores - scores.detach())  # the difference is exactly 0, its gradient is 1
    sigma = (mask.sum().clamp(min=1) / mask.numel()).sqrt()
    return weight * mask / sigma


class Masked(nn.Module):
    """A frozen layer whose weight is seen through a mask: one score per weight, all of them 1 at the start."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.scores = nn.Parameter(torch.ones_like(layer.weight))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's forward under θ · M / σ; its bias stays as it is."""
        return functional_call(self.layer, {"weight": effective_weight(self.layer.weight, self.scores)}, (x,))


class Bits(nn.Module):
    """The same for inference: the bits make the effective weight once, no score is left."""

    def __init__(self, layer: nn.Module, packed: Tensor) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        bits = np.unpackbits(packed.numpy(), count=layer.weight.numel())  # MSB first, C order of the weight
        scores = torch.from_numpy(bits).reshape(layer.weight.shape).float()  # 1 is above 0, and 0 is not
        self.register_buffer("weight", effective_weight(layer.weight, scores).detach())

    def forward(self, x: Tensor) -> Tensor:
        """The layer's forward under the effective weight."""
        return functional_call(self.layer, {"weight": self.weight}, (x,))


def masked_layers(model: nn.Module) -> dict[str, Masked]:
    """The masked layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Masked)}


def save(model: nn.Module, path: Path) -> None:
    """One bit per masked weight, and the head whole."""
    masks = {
        f"{name}.smn_mask": torch.from_numpy(np.packbits((layer.scores > 0).numpy()))
        for name, layer in masked_layers(model).items()
    }
    save_file({**masks, **{f"head.{name}": value for name, value in model.head.state_dict().items()}}, path)


def load(base: nn.Module, path: Path) -> nn.Module:
    """The adapted model, from a base and a file of [`save`]."""
    model, tensors = copy.deepcopy(base), load_file(path)
    for key in [key for key in tensors if key.endswith(".smn_mask")]:
        name = key.removesuffix(".smn_mask")
        setattr(model, name, Bits(getattr(model, name), tensors[key]))
    model.head.load_state_dict({name: tensors[f"head.{name}"] for name in ("weight", "bias")})
    return model


def digits(first: int, count: int = 5, test: int = 400) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images (n, 1, 8, 8) and labels (n,) of the digits `first` to `first + count - 1`."""
    data = load_digits()
    kept = (data.target >= first) & (data.target < first + count)
    images = torch.tensor(data.images[kept], dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(data.target[kept]) - first
    return images[:-test], labels[:-test], images[-test:], labels[-test:]


def network() -> nn.Sequential:
    """Two convolutions, a hidden layer, a head for five classes."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 32, 3, padding=1),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(32, 64, 3, stride=2, padding=1),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            fc=nn.Linear(1024, 64),
            relu3=nn.ReLU(),
            head=nn.Linear(64, 5),
        )
    )


def train(model: nn.Module, groups: list[dict], images: Tensor, labels: Tensor, epochs: int = 10) -> None:
    """Cross-entropy under SGD with momentum .9, the learning rates following a cosine to 0."""
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        schedule.step()


def main() -> None:
    """Train a base, mask it for other digits, save, load, compare."""
    torch.manual_seed(0)
    base = network()
    images, labels, _, _ = digits(0)
    train(base, [{"params": base.parameters(), "lr": 0.05}], images, labels)
    base.head = nn.Linear(64, 5)
    model = copy.deepcopy(base)
    for name in ("conv1", "conv2", "fc"):
        setattr(model, name, Masked(getattr(model, name)))
    scores = [layer.scores for layer in masked_layers(model).values()]
    images, labels, test_images, test_labels = digits(5)
    train(model, [{"params": scores, "lr": 10.0}, {"params": model.head.parameters(), "lr": 0.05}], images, labels)

    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        logits, path = model(test_images), Path(folder, "mask.safetensors")
        save(model, path)
        size, again = path.stat().st_size, load(base, path)(test_images)
    density = sum(int((s > 0).sum()) for s in scores) / sum(s.numel() for s in scores)
    print(f"accuracy {(logits.argmax(1) == test_labels).float().mean():.3f}, density {density:.3f}, file {size} bytes")
    print(f"reloaded, logits identical: {torch.equal(logits, again)}")


if __name__ == "__main__":
    main()
