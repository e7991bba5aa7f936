# SPDX-License-Identifier: Apache-2.0
"""Mask a real ViT-Tiny (ImageNet-21k weights) for CIFAR-10: 2,000 training images at 64 px, six epochs.

SMN_ASSETS names a folder with `vit_tiny_patch16_224.augreg_in21k_ft_in1k.fp16.safetensors` and `cifar10_jpeg.npz`.
The images are lossy JPEGs of a small subset: no number here compares with the paper's.
"""

from __future__ import annotations

from cifar import assets_folder
from experiment import main
from torch import nn
from transfer_recipe import Recipe

from smn_peft.backbones import load_backbone

TARGETS = r"backbone\.blocks\.\d+\..*(qkv|proj|fc1|fc2)"
FULL_SGD = Recipe("full fine-tuning, SGD", mask=False, adam=False, lrs=(0.001, 0.003, 0.01))
FULL_ADAM = Recipe("full fine-tuning, Adam", mask=False, lrs=(1e-4, 3e-4, 1e-3))
PAPER = Recipe("mask, the paper's recipe (SGD, random head)", mask=True, adam=False, probe_head=False, lrs=(3, 10, 30))
MASK = Recipe("mask, Adam on the scores, head from the probe", mask=True, lrs=(0.03, 0.06, 0.1))


def build() -> nn.Module:
    """The backbone at 64 px, features (batch, 192); transformers' wrapper around timm's model is taken off."""
    weights = assets_folder() / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.fp16.safetensors"
    return load_backbone("vit_tiny_patch16_224", state_dict=weights, image_size=64).model.timm_model


if __name__ == "__main__":
    main(build, [FULL_SGD, FULL_ADAM, PAPER, MASK], [MASK], 64, (0.5,) * 3, (0.5,) * 3, targets=TARGETS)
