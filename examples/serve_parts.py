# SPDX-License-Identifier: Apache-2.0
"""Parts of `serve_load.py`: a small bank, pictures, what each task says of them; not an example by itself."""

from __future__ import annotations

import http.client
import io
import re
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from peft import get_peft_model
from PIL import Image
from safetensors.torch import save_file

from smn_peft import MaskConfig
from smn_peft.data import evaluation_transform
from smn_peft.data.decoding import decode_rgb
from smn_peft.serving.bank import open_bank


def small_bank(folder: Path) -> list[str]:
    """Save a base and adapters of it; returns the arguments that name them."""
    for task in range(20):
        torch.manual_seed(0)
        base = timm.create_model("test_vit", num_classes=10)
        save_file(base.state_dict(), folder / "base.safetensors")
        model = get_peft_model(base, MaskConfig(modules_to_save=["head"]))
        torch.manual_seed(task)
        for name, parameter in model.named_parameters():
            if "smn_" in name:
                parameter.data = 0.9 + task / 200 - torch.rand_like(parameter)  # 90 to 99.5 % stay on
            elif "head.modules_to_save" in name:
                parameter.data = torch.randn_like(parameter)
        model.save_pretrained(str(folder / "bank" / f"task-{task:02}"))
    return [str(folder / "bank"), "--base=test_vit", f"--weights={folder / 'base.safetensors'}"]


def pictures(count: int) -> list[bytes]:
    """JPEG files of 320 × 240 pixels, smooth noise."""
    files = []
    for small in np.random.default_rng(0).integers(0, 256, (count, 12, 16, 3), dtype=np.uint8):
        Image.fromarray(small).resize((320, 240), Image.Resampling.BICUBIC).save(file := io.BytesIO(), "JPEG")
        files.append(file.getvalue())
    return files


def logits_of_all(files: list[bytes], bank: str, base: str, **options: Any) -> dict[str, torch.Tensor]:
    """(images, classes) by task, one task after the other and without a server."""
    opened, backbone, _ = open_bank(bank, base, **options, read_only=True)
    transform = evaluation_transform(backbone.image_size, backbone.mean, backbone.std)
    images, found = torch.stack([transform(decode_rgb(file, "image")) for file in files]), {}
    with opened, torch.no_grad():
        for name in opened.names:
            with opened.use(name) as model:
                found[name] = model(images)["logits"]
    return found


def figures(port: int) -> tuple[float, float]:
    """MiB that the server has in memory, and MiB of them that decoded tasks take."""
    with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    names = ("process_resident_memory_bytes", "smn_bank_resident_bytes")
    memory, tasks = (float(re.search(rf"^{name} (\S+)", text, re.MULTILINE)[1]) / (1 << 20) for name in names)
    return memory, tasks
