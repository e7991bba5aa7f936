# SPDX-License-Identifier: Apache-2.0
"""Images per second and core of the training loader, against decoding alone and against the bare resized crop.

Floor: nothing that crops at random can be faster than decoding and resizing; what colours, blur and stacking add is
the distance to it. CPU time of one thread is taken, so a busy machine changes little. Images are smooth noise, stored
as JPEG: 32 pixels for the small crops, 500 × 375 for the large ones.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from functools import partial

import torch
from PIL import Image
from recording import Recorder
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from smn_peft.data import ImageDataset, build_loader, multi_crop_transform, supervised_transform
from smn_peft.data.decoding import decode_rgb
from smn_peft.data.sources import EncodedImages

COUNT, BATCH = 64, 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Source height and width, size of global and of local crops, repetitions of the data.
CASES = {"224 / 96": ((375, 500), 224, 96, 1), "64 / 32": ((32, 32), 64, 32, 8)}


def dataset_of(height: int, width: int) -> ImageDataset:
    """Random JPEG images of this size."""
    generator = torch.Generator().manual_seed(0)
    files = []
    for _ in range(COUNT):
        noise = torch.rand(1, 3, max(4, height // 16), max(4, width // 16), generator=generator)
        pixels = F.interpolate(noise, (height, width), mode="bilinear")[0].mul(255).to(torch.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=90)
        files.append(torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8))
    offsets = torch.tensor([0, *(len(file) for file in files)]).cumsum(0)
    source = EncodedImages(torch.cat(files), offsets, "random images")
    return ImageDataset(
        source, labels=torch.arange(COUNT) % 2, classes=None, name="random", split="train", rows=torch.arange(COUNT)
    )


def decode(dataset: ImageDataset) -> None:
    """Read every image."""
    for row in range(len(dataset)):
        decode_rgb(*dataset.source.read(row))


def resize(dataset: ImageDataset, sizes: list[int]) -> None:
    """Read every image and resize it once per crop, to fp32."""
    for index in range(len(dataset)):
        image = dataset[index]["image"]
        for size in sizes:
            TF.resize(image, [size, size], interpolation=InterpolationMode.BICUBIC, antialias=True).float()


def load(loader: object) -> None:
    """Go through one epoch."""
    for _ in loader:  # type: ignore[attr-defined]
        pass


def per_second(function: Callable[[], None], repeat: int) -> float:
    """Images per second of CPU time, the best of three."""
    function()
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        for _ in range(repeat):
            function()
        best = min(best, time.process_time() - start)
    return COUNT * repeat / best


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    recorder = Recorder("loader")
    print("Loader, images per second and core")
    print("| transform | px | decode | decode + resize | loader | loader, cached | loader / (decode + resize) |")
    print("|---|---|---|---|---|---|---|")
    for pixels, ((height, width), large, small, repeat) in CASES.items():
        dataset = dataset_of(height, width)
        cached = dataset.cached()
        decoding = per_second(partial(decode, dataset), repeat)
        for name, transform, sizes in (
            ("supervised", supervised_transform(large, MEAN, STD), [large]),
            ("2 global", multi_crop_transform(MEAN, STD, global_size=large, local_crops=0), [large] * 2),
            (
                "2 global + 6 local",
                multi_crop_transform(MEAN, STD, global_size=large, local_size=small),
                [large] * 2 + [small] * 6,
            ),
        ):
            floor = per_second(partial(resize, dataset, sizes), repeat)
            stored, held = (
                per_second(partial(load, build_loader(data, transform, BATCH)), repeat) for data in (dataset, cached)
            )
            for what, found in (("loader", stored), ("cached loader", held)):
                what = f"images/s, {what} / (decode + resize)"
                recorder.add(what, f"{name}, {pixels} px", found / floor, better="higher")
            print(
                f"| {name} | {pixels} | {decoding:.0f} | {floor:.0f} | {stored:.0f} | {held:.0f} "
                f"| {stored / floor:.2f} |"
            )


if __name__ == "__main__":
    main()
