# SPDX-License-Identifier: Apache-2.0
"""A whole run that takes a second: a data set of tiny images on disk, and a tiny model from a user's file."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.state import AcceleratorState
from PIL import Image

from smn_peft.training import TrainArguments, run

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("red", "green", "blue")
TRAIN, TEST, SIDE = 48, 24, 20

MODEL = """
import timm

def build():
    # Unseeded: the weights are the run's own.
    options = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "zero_init_last": False}
    model = timm.create_model("resnet18", num_classes=0, **options)
    model.mean, model.std, model.image_size = (0.5,) * 3, (0.25,) * 3, 16
    return model
"""


def picture(label: int, generator: np.random.Generator) -> bytes:
    """A noisy PNG of the class's colour."""
    pixels = 60 + 90 * np.eye(3)[label] + generator.normal(0, 50, (SIDE, SIDE, 3))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_npz(path: Path, labels: list[int] | None = None, broken: int | None = None, named: bool = True) -> Path:
    """The data set as an npz; image `broken` is cut off in the middle."""
    generator = np.random.default_rng(0)
    labels = [i % 3 for i in range(TRAIN + TEST)] if labels is None else labels
    files = [picture(label, generator) for label in labels]
    if broken is not None:
        files[broken] = files[broken][: len(files[broken]) // 2]
    np.savez(
        path,
        jpeg=np.frombuffer(b"".join(files), np.uint8),
        offsets=np.cumsum([0, *map(len, files)]),
        label=np.array(labels, np.int16),
        split=np.array([0] * (len(labels) - TEST) + [1] * TEST, np.uint8),
        **({"classes": np.array(CLASSES)} if named else {}),
    )
    return path


def finished_run(folder: Path, **options: Any) -> Path:
    """Run in a folder; its base (``model.py``) is seeded then, for an adapter without run.json, which has the seed."""
    run(tiny_arguments(folder, **options))
    AcceleratorState._reset_state(reset_partial_state=True)
    model = folder / "model.py"
    model.write_text(model.read_text().replace("# Unseeded", "import torch; torch.manual_seed(0)  #", 1))
    return folder


VIT = """

def build_vit():
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **options)
    model.mean, model.std, model.image_size = (0.5,) * 3, (0.25,) * 3, 16
    return model
"""
DOUBLE = """

def build_double():
    model = build().double()
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    return model
"""


def write_model(folder: Path, function: str = "build") -> str:
    """A user's file with the tiny ResNet, the same in float64 and a tiny ViT (`build_double`, `build_vit`).

    Returns "file.py:function".
    """
    (folder / "model.py").write_text(MODEL + DOUBLE + VIT)
    return f"{folder / 'model.py'}:{function}"


def base_of(folder: Path) -> str:
    """The tiny model that [`write_model`] wrote into a folder, as whoever loads a run of it has to name it."""
    return f"{folder / 'model.py'}:build"


SWAV = {
    "objective": "swav",
    "objective_options": {
        "hidden_dim": 16,
        "output_dim": 8,
        "prototypes": 6,
        "queue_length": 16,
        "queue_from_step": 1,
        "freeze_prototypes_steps": 2,
    },
    "multi_crop": {
        "local_crops": 1,
        "local_size": 12,
        "local_scale": [0.3, 0.6],
        "global_scale": [0.6, 1.0],
        "blur": 0.0,
        "jitter": [0.4, 0.4, 0.0, 0.0],
        "grayscale": 0.0,
    },
}


def write_clip(folder: Path) -> str:
    """A CLIP of 16 pixels with a byte-level tokenizer without merges: every letter is a token."""
    import torch
    import transformers

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + list(".,")
    names = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocab = {name: index for index, name in enumerate(names)}
    transformers.CLIPTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    transformers.CLIPImageProcessor(**size).save_pretrained(folder)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(names), "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 40}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    return str(folder)


def tiny_arguments(folder: Path, **options: Any) -> TrainArguments:
    """Arguments of a run of 8 steps on the CPU, in ``folder/out``; model and data are written into `folder`."""
    defaults: dict[str, Any] = {
        "backbone": write_model(folder) if "backbone" not in options else None,
        "dataset": str(write_npz(folder / "set.npz")) if "dataset" not in options else None,
        "output_dir": str(folder / "out"),
        "epochs": 2,
        "batch_size": 12,
        "lr": 5.0,
        "knn_k": 5,
        "log_every": 1,
        "cpu": True,
        "supervised": {"jitter_probability": 0.0, "grayscale": 0.0, "solarize": 0.0},
    }
    return TrainArguments(**{**defaults, **options})


def smn(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """`smn` in a process of its own."""
    line = [sys.executable, "-m", "smn_peft.cli", *map(str, words)]
    return subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=240, **options)


def environment() -> dict[str, str]:
    """The environment of a process that finds the package, with one thread."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
