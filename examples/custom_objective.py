# SPDX-License-Identifier: Apache-2.0
"""An objective of your own in 20 lines: InfoNCE on two views, registered by name and tried on a small model.

The negatives are those of one process. It reproduces no number of the paper, which learns without labels by SwAV.
"""

from dataclasses import dataclass, field

import timm
import torch
from torch.nn import functional as F

from smn_peft.objectives import Objective, create_objective, register_objective


@dataclass(frozen=True)
class InfoNCEOptions:
    """Options; recipes and the command line read them from here."""

    temperature: float = field(default=0.2, metadata={"help": "Temperature of the similarities."})
    output_dim: int = field(default=64, metadata={"help": "Dimension of the embeddings."})


@register_objective("info_nce")
class InfoNCE(Objective):
    """Find the other view of an image among those of the whole batch (van den Oord et al. 2018)."""

    views, needs_labels, consumes = "crops", False, "features"
    Options = InfoNCEOptions

    def __init__(self, feature_dim, num_classes, options):
        super().__init__(feature_dim, num_classes, options)
        hidden, out = torch.nn.Linear(feature_dim, 256), torch.nn.Linear(256, options.output_dim)
        self.head = torch.nn.Sequential(hidden, torch.nn.BatchNorm1d(256), torch.nn.ReLU(), out)

    def forward(self, model, batch):
        """Two views in, the loss and what to log out."""
        first, second = batch["crops"]
        embeddings = F.normalize(self.head(model(torch.cat([first, second]))).float(), dim=1)
        logits = embeddings[: len(first)] @ embeddings[len(first) :].T / self.options.temperature
        labels = torch.arange(len(first), device=logits.device)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        return {"loss": loss, "accuracy": (logits.detach().argmax(1) == labels).float().mean()}


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the model is too small for more
    model = timm.create_model("resnet18", channels=(8, 16, 32, 64), num_classes=0)
    objective = create_objective("info_nce", feature_dim=model.num_features, options={"temperature": 0.1})
    optimizer = torch.optim.SGD([*model.parameters(), *objective.parameters()], lr=0.05, momentum=0.9)
    images = torch.randn(32, 3, 32, 32)
    for step in range(20):
        views = [images + 0.3 * torch.randn_like(images) for _ in range(2)]  # noise stands for augmentation
        outputs = objective(model, {"crops": views})
        optimizer.zero_grad()
        outputs["loss"].backward()
        optimizer.step()
        if step in (0, 19):
            print(f"step {step}: loss {outputs['loss']:.3f}, accuracy {outputs['accuracy']:.3f}")
