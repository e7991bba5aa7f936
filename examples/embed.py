# SPDX-License-Identifier: Apache-2.0
"""Embeddings under a mask as a column of a dataset: by `datasets.map`, and with --ray by Ray Data's `map_batches`.

Base and mask are small and random, so nothing of the paper is reproduced. `smn embed` writes files instead.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import datasets
import numpy as np
import torch
from peft import get_peft_model

from smn_peft import MaskConfig
from smn_peft.backbones import load_backbone
from smn_peft.embedding import Embedder


def small_adapter(folder: Path) -> tuple[str, str]:
    """Save a base and a mask of it; returns their folders, in whose place Hub ids or a run's folder can stand."""
    torch.manual_seed(0)
    model = load_backbone("test_vit", pretrained=False).model
    model.save_pretrained(str(folder / "base"))
    base = str(folder / "base")
    adapted = get_peft_model(load_backbone(base).model, MaskConfig(init_weights=False))
    adapted.save_pretrained(str(folder / "adapter"))
    return base, str(folder / "adapter")


def main() -> None:
    """Embed the same images both ways."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ray", action="store_true", help='also by Ray: pip install "smn_peft[ray]"')
    arguments = parser.parse_args()
    pictures = np.random.default_rng(0).integers(0, 256, (12, 40, 60, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        base, adapter = small_adapter(Path(folder))

        columns = datasets.Features({"image": datasets.Image()})
        dataset = datasets.Dataset.from_dict({"image": list(pictures)}, features=columns)
        dataset = dataset.map(Embedder(base, adapter), batched=True, batch_size=6, num_proc=2)
        embeddings = np.array(dataset["embedding"], np.float32)
        print(f"datasets: {len(embeddings)} embeddings of dim {embeddings.shape[1]}")

        if arguments.ray:
            import ray

            workers = ray.data.ActorPoolStrategy(size=2)
            data = ray.data.from_items([{"number": i, "image": image} for i, image in enumerate(pictures)])
            data = data.map_batches(Embedder, fn_constructor_args=(base, adapter), batch_size=6, compute=workers)
            rows = sorted(data.take_all(), key=lambda row: row["number"])
            found = np.stack([row["embedding"] for row in rows])
            print(f"Ray: the same up to rounding: {np.allclose(found, embeddings, rtol=1e-4, atol=1e-5)}")


if __name__ == "__main__":
    main()
