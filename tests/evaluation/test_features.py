# SPDX-License-Identifier: Apache-2.0
"""Features of a whole dataset: in order, in eval mode, without a trace in the model, the same over processes."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch import nn

from smn_peft import MaskConfig
from smn_peft.backbones import load_backbone, pooled_features
from smn_peft.evaluation import Features, extract_features
from tests.gloo import join_group, run_processes


def scaled(image: torch.Tensor) -> torch.Tensor:
    return image.float() / 255


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("workers", [0, 2])
def test_features_come_in_order_and_un_augmented(images, batch_size, workers):
    model, dataset = small(), images()
    found = extract_features(model, dataset, scaled, batch_size=batch_size, num_workers=workers)
    model.eval()
    with torch.no_grad():
        expected = model(torch.stack([scaled(image) for image in dataset.images]))
    torch.testing.assert_close(found.features, expected)
    assert torch.equal(found.labels, dataset.labels)
    assert len(found) == 7
    assert not found.features.requires_grad


def test_training_goes_on_as_if_nothing_had_happened(images):
    model, dataset = small().train(), images()
    model[1].eval()  # a BatchNorm held frozen while the rest trains
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    extract_features(model, dataset, scaled)
    assert [module.training for module in model.modules()] == modes
    assert len(set(modes)) == 2
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    model(torch.rand(2, 3, 32, 32)).sum().backward()


def test_modes_are_restored_after_an_error(images):
    model = small().train()
    with pytest.raises(RuntimeError):
        extract_features(model, images(), lambda image: scaled(image)[:1])
    assert all(module.training for module in model.modules())


def test_a_masked_model_trains_on_after_its_features_were_taken(images):
    model = get_peft_model(small(), MaskConfig(target_modules=["0"], batch_norm="adapt")).train()
    before = extract_features(model, images(), scaled)
    scores = [p for p in model.parameters() if p.requires_grad]
    model(torch.rand(8, 3, 32, 32)).square().sum().backward()
    torch.optim.SGD(scores, lr=1e6).step()
    after = extract_features(model, images(), scaled)
    assert not torch.equal(before.features, after.features)
    model.eval()
    with torch.no_grad():
        expected = model(torch.stack([scaled(image) for image in images().images]))
    torch.testing.assert_close(after.features, expected)


def test_a_backbone_brings_its_own_transform(images):
    backbone = load_backbone("resnet18", pretrained=False, image_size=32)
    dataset = images(3)
    found = extract_features(backbone, dataset)
    from torchvision.transforms.functional import to_pil_image

    pixels = torch.stack([backbone.transform(to_pil_image(image)) for image in dataset.images])
    with torch.no_grad():
        torch.testing.assert_close(found.features, backbone.features(pixels))
    assert found.features.shape == (3, backbone.feature_dim)


def test_features_before_the_head_and_logits_by_a_function(images):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=5)
    features = extract_features(model, images(2), scaled)
    logits = extract_features(model, images(2), scaled, function=model)
    assert features.features.shape == (2, 512)
    torch.testing.assert_close(model.get_classifier()(features.features), logits.features)


def test_autocast_is_off_unless_asked_for(images):
    model, dataset = small(), images()
    plain = extract_features(model, dataset, scaled)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        surrounded = extract_features(model, dataset, scaled)
    half = extract_features(model, dataset, scaled, autocast=torch.bfloat16)
    assert torch.equal(surrounded.features, plain.features)
    assert half.features.dtype == torch.float32
    assert not torch.equal(half.features, plain.features)
    torch.testing.assert_close(half.features, plain.features, rtol=0.05, atol=0.02)


def test_bf16_weights_give_fp32_features(images):
    found = extract_features(small().bfloat16(), images(), scaled)
    assert found.features.dtype == torch.float32


def test_an_unlabelled_dataset_has_features_without_labels(images):
    found = extract_features(small(), images(labelled=False), scaled)
    assert found.labels is None
    with pytest.raises(ValueError, match=r"k-NN needs labels and these features have none: load the dataset with"):
        found.labels_for("k-NN")


def test_one_process_with_an_accelerator_is_the_same(images):
    model, dataset = small(), images()
    found = extract_features(model, dataset, scaled, accelerator=Accelerator(cpu=True))
    assert torch.equal(found.features, extract_features(model, dataset, scaled).features)


class Numbered:
    """Image i is filled with the value i, its label is i."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict:
        return {"image": torch.full((3, 4, 4), index, dtype=torch.uint8), "label": index, "index": index}


def flat() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 5))


SIZES = [1, 2, 7, 12]


def extract() -> dict[str, torch.Tensor]:
    """Features of every size, as one of several processes that `accelerate launch` started."""
    join_group()
    accelerator = Accelerator(cpu=True)
    found = {"processes": torch.tensor(accelerator.num_processes)}
    for n in SIZES:
        features = extract_features(flat(), Numbered(n), torch.Tensor.float, batch_size=3, accelerator=accelerator)
        found |= {f"features_{n}": features.features, f"labels_{n}": features.labels}
    return found


def test_two_processes_share_the_work_and_both_get_the_whole(tmp_path):
    model = flat()
    for found in run_processes(extract, 2, tmp_path):
        assert int(found["processes"]) == 2
        for n in SIZES:
            assert found[f"labels_{n}"].tolist() == list(range(n))
            pixels = torch.arange(n).float().view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
            with torch.no_grad():
                torch.testing.assert_close(found[f"features_{n}"], model(pixels))


def test_a_bare_model_needs_a_transform_and_a_dataset_an_image(images):
    with pytest.raises(ValueError, match=r"Pass transform=…: only a Backbone knows its own"):
        extract_features(small(), images())
    with pytest.raises(ValueError, match=r"The dataset is empty: there is nothing to extract features of"):
        extract_features(small(), images(0), scaled)


def test_features_that_are_not_finite_are_refused_with_their_number(images):
    model = small()
    with torch.no_grad():
        model[1].running_var.fill_(float("nan"))
    with pytest.raises(
        ValueError, match=r"Features: 7 of 7 rows hold NaN or infinity, the first is row 0\. The model"
    ):
        extract_features(model, images(), scaled)


def test_features_check_their_form():
    with pytest.raises(ValueError, match=r"must be \(n, dim\); got \(2, 3, 4\)\. Pool or flatten"):
        Features(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"2 features need as many labels, \(2,\); got \(3,\)"):
        Features(torch.zeros(2, 3), torch.zeros(3))
    made = Features(
        torch.zeros(2, 3, dtype=torch.float64, requires_grad=True), torch.tensor([1, 0], dtype=torch.uint8)
    )
    assert (made.features.dtype, made.labels.dtype) == (torch.float32, torch.int64)
    assert not made.features.requires_grad
    assert made.subset(torch.tensor([1])).labels.tolist() == [0]
    assert Features(torch.zeros(2, 3)).subset(torch.tensor([1])).labels is None


def test_pooled_features_are_what_is_extracted(images):
    backbone = load_backbone("vit_tiny_patch16_224", pretrained=False, image_size=32)
    found = extract_features(backbone.model, images(2), scaled)
    with torch.no_grad():
        expected = pooled_features(backbone.model, torch.stack([scaled(image) for image in images(2).images]))
    torch.testing.assert_close(found.features, expected)


def test_labels_are_whole_numbers_or_an_error():
    assert Features(torch.zeros(2, 3), torch.tensor([0.0, 1.0])).labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"Features: label 0\.5 \(number 1\) is no whole number"):
        Features(torch.zeros(2, 3), torch.tensor([0.0, 0.5]))
    items = [{"image": torch.zeros(3, 4, 4, dtype=torch.uint8), "label": 1 - 1e-9}]
    with pytest.raises(ValueError, match=r"An image: label 0\.999999999"):
        extract_features(nn.Flatten(), items, scaled)
