# SPDX-License-Identifier: Apache-2.0
"""The whole of it in plain PyTorch: train a ResNet on the digits 0–4, mask it for the digits 5–9, save, load, compare.

The task of `quickstart.py`, with its recipe and without its baselines; like it, no number of the paper is reproduced.
"""

import copy
import tempfile
from pathlib import Path

import timm
import torch
from peft import PeftModel, get_peft_model
from sklearn.datasets import load_digits
from torch.nn import functional as F

from smn_peft import MaskConfig

data = load_digits()
images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # (1797, 1, 8, 8) in [-1, 1]
images, labels = F.interpolate(images, size=(32, 32), mode="bilinear"), torch.tensor(data.target)
test = torch.zeros(len(labels), dtype=torch.bool)
test[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:800]] = True
OLD, NEW = labels < 5, labels >= 5


def train(model, optimizer, images, labels, epochs=5):
    """Cross-entropy, the learning rates following a cosine to 0."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(32):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return model.eval()


torch.manual_seed(0)
torch.set_num_threads(1)  # the model is too small for more
base = timm.create_model("resnet18", channels=(16, 32, 64, 128), in_chans=1, num_classes=5)
train(base, torch.optim.SGD(base.parameters(), lr=0.05, momentum=0.9), images[OLD & ~test], labels[OLD & ~test])
untouched = copy.deepcopy(base)
base.reset_classifier(5)
model = get_peft_model(base, MaskConfig(modules_to_save=["fc"]))
scores = [p for name, p in model.named_parameters() if p.requires_grad and "smn_" in name]
head = [p for name, p in model.named_parameters() if p.requires_grad and "smn_" not in name]
optimizer = torch.optim.Adam([{"params": scores, "lr": 0.1}, {"params": head, "lr": 0.01}], fused=True)
train(model, optimizer, images[NEW & ~test], labels[NEW & ~test] - 5)

with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
    logits = model(images[NEW & test])
    accuracy = (logits.argmax(1) == labels[NEW & test] - 5).float().mean()
    model.save_pretrained(folder, save_embedding_layers=False)  # else PEFT asks the Hub for the base's vocabulary
    again = PeftModel.from_pretrained(untouched, folder).eval()
    size = Path(folder, "adapter_model.safetensors").stat().st_size
    print(f"accuracy {accuracy:.3f}, density {model.density():.3f}, file {size} bytes")
    print(f"reloaded, logits identical: {torch.equal(logits, again(images[NEW & test]))}")
