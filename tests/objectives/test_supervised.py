# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of logits and CLIP's zero-shot head: values, gradients, precision, and bad batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smn_peft.objectives import create_objective

LABELS = torch.tensor([0, 2, 1, 2])


def batch_of(dim: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(4, dim, generator=generator), "labels": LABELS}


def zero_shot(scale: Tensor | float = 10.0, **options):
    embeddings = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)) * 7
    arguments = {"class_embeddings": embeddings, "logit_scale": scale}
    return create_objective("zero_shot", feature_dim=5, num_classes=3, options=options, **arguments), embeddings


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_the_logits(smoothing):
    objective = create_objective("cross_entropy", feature_dim=6, num_classes=3, options={"label_smoothing": smoothing})
    model, batch = nn.Linear(6, 3), batch_of()
    outputs = objective(model, batch)
    log_p = model(batch["pixel_values"]).log_softmax(1)
    picked = log_p[torch.arange(4), LABELS]
    expected = -((1 - smoothing) * picked + smoothing * log_p.mean(1)).mean()
    torch.testing.assert_close(outputs["loss"], expected)
    assert outputs["accuracy"].item() == (log_p.argmax(1) == LABELS).float().mean().item()
    assert not outputs["accuracy"].requires_grad
    outputs["loss"].backward()
    assert model.weight.grad.abs().max() > 0
    assert list(objective.state_dict()) == []


def test_zero_shot_is_the_scaled_cosine():
    objective, embeddings = zero_shot(scale=torch.tensor(10.0, dtype=torch.float64))
    model, batch = nn.Linear(6, 5), batch_of()
    features = model(batch["pixel_values"])
    expected = 10 * F.cosine_similarity(features[:, None], embeddings[None], dim=2)
    torch.testing.assert_close(objective.logits(features), expected)
    outputs = objective(model, batch)
    torch.testing.assert_close(outputs["loss"], F.cross_entropy(expected, LABELS))
    assert outputs["accuracy"].item() == (expected.argmax(1) == LABELS).float().mean().item()
    outputs["loss"].backward()
    assert model.weight.grad.abs().max() > 0


def test_zero_shot_has_nothing_to_train_and_saves_its_head():
    objective, embeddings = zero_shot()
    assert list(objective.parameters()) == []
    assert sorted(objective.state_dict()) == ["class_embeddings", "logit_scale"]
    other, _ = zero_shot(scale=1.0)
    other.load_state_dict(objective.state_dict())
    features = torch.randn(2, 5)
    assert torch.equal(other.logits(features), objective.logits(features))
    torch.testing.assert_close(objective.class_embeddings, F.normalize(embeddings, dim=1))


@pytest.mark.parametrize("name", ["cross_entropy", "zero_shot"])
def test_loss_is_fp32_under_autocast(name):
    model, batch = nn.Linear(6, 5 if name == "zero_shot" else 3), batch_of()
    objective = zero_shot()[0] if name == "zero_shot" else create_objective(name, feature_dim=6, num_classes=3)
    with torch.autocast("cpu", torch.bfloat16):
        features = model(batch["pixel_values"])
        outputs = objective(model, batch)
    assert features.dtype == torch.bfloat16
    assert outputs["loss"].dtype == torch.float32
    logits = objective.logits(features.float()) if name == "zero_shot" else features.float()
    torch.testing.assert_close(outputs["loss"], F.cross_entropy(logits, LABELS))


@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        ("labels", r"needs batch\['labels'\], and the batch has \['pixel_values'\]: use a data set with labels"),
        ("pixel_values", r"needs batch\['pixel_values'\], and the batch has \['labels'\]: use a transform"),
    ],
)
def test_a_batch_that_lacks_something_is_named(lacking, message):
    batch = batch_of()
    del batch[lacking]
    for objective in (create_objective("cross_entropy", feature_dim=6, num_classes=3), zero_shot()[0]):
        with pytest.raises(ValueError, match=f"{objective.name} {message}"):
            objective(nn.Linear(6, 3), batch)


def test_a_model_of_another_width_is_named():
    objective = create_objective("cross_entropy", feature_dim=6, num_classes=3)
    with pytest.raises(ValueError, match=r"made for 3 classes, and the model returned \(4, 2\): load it with"):
        objective(nn.Linear(6, 2), batch_of())
    with pytest.raises(ValueError, match=r"features of shape \(batch, 5\), and the model returned \(4, 2\)"):
        zero_shot()[0](nn.Linear(6, 2), batch_of())


@pytest.mark.parametrize(
    ("embeddings", "scale", "message"),
    [
        (torch.ones(3, 4), 10.0, r"\(classes, dim\) = \(3, 5\), got \(3, 4\): take the text tower"),
        (torch.ones(2, 5), 10.0, r"\(classes, dim\) = \(3, 5\), got \(2, 5\)"),
        (torch.full((3, 5), torch.nan), 10.0, "zero or not finite"),
        (torch.zeros(3, 5), 10.0, "zero or not finite"),
        (torch.ones(3, 5), -1.0, r"logit_scale must be above 0, got -1.0: CLIP's is exp\(model.logit_scale\)"),
    ],
)
def test_zero_shot_refuses_what_does_not_fit(embeddings, scale, message):
    with pytest.raises(ValueError, match=message):
        create_objective("zero_shot", feature_dim=5, num_classes=3, class_embeddings=embeddings, logit_scale=scale)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_label_smoothing_out_of_range_is_named(smoothing):
    with pytest.raises(ValueError, match="label_smoothing must be at least 0 and below 1"):
        create_objective("cross_entropy", feature_dim=6, num_classes=3, options={"label_smoothing": smoothing})
