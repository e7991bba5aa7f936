# SPDX-License-Identifier: Apache-2.0
"""SwAV against a plain loop and against lightly: loss, gradients, queue, frozen prototypes, precision, collapse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smn_peft.objectives import SwAV, create_objective
from smn_peft.objectives.swav import swapped_prediction_loss

DIM, BATCH, PROTOTYPES = 12, 8, 8
SMALL = {
    "hidden_dim": 16,
    "output_dim": 6,
    "prototypes": PROTOTYPES,
    "queue_length": 0,
    "freeze_prototypes_steps": 0,
}
# fp32: losses and gradients agree to these with a loop that sums in another order.
TOLERANCE = {"rtol": 2e-4, "atol": 1e-6}


class Pooled(nn.Module):
    """A small model: mean colours of the four quarters, then a linear layer; any image size."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, DIM)
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(tuple(images.shape))
        return self.linear(F.adaptive_avg_pool2d(images, 2).flatten(1))


def crops_of(local: int = 3, seed: int = 0, batch: int = BATCH, global_crops: int = 2) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [16] * global_crops + [8] * local
    return {"crops": [torch.randn(batch, 3, size, size, generator=generator) for size in sizes]}


def swav(**options) -> SwAV:
    objective = create_objective("swav", feature_dim=DIM, options={**SMALL, **options})
    objective.before_step(0) if objective.options.queue_from_step is not None else objective.begin(1)
    return objective


def plain_sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    q = (scores.double() / epsilon).exp()
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True)
        q = q / q.sum(1, keepdim=True)
    return q.float()


def plain_loss(scores: list[Tensor], queue_scores: list[Tensor] | None, global_crops: int = 2) -> Tensor:
    """Readable SwAV: every global crop's codes against every other view's prediction, one image at a time."""
    total, pairs = 0.0, 0
    for s in range(global_crops):
        rows = scores[s].detach()
        if queue_scores is not None:
            rows = torch.cat([rows, queue_scores[s].detach()])
        codes = plain_sinkhorn(rows, 0.05, 3)[: len(scores[s])]
        for t in range(len(scores)):
            if t != s:
                for i in range(len(scores[t])):
                    total = total - (codes[i] * F.log_softmax(scores[t][i] / 0.1, dim=0)).sum() / len(scores[t])
                pairs += 1
    return total / pairs


def scores_of(objective: SwAV, model: nn.Module, batch: dict[str, list[Tensor]]) -> list[Tensor]:
    """Similarities of every view; with a projection without BatchNorm each crop can go alone."""
    return [objective.prototypes(objective.head(model(crop))) for crop in batch["crops"]]


def fill_queue(objective: SwAV, rows: Tensor) -> None:
    objective.queue.copy_(rows)
    objective.queue_filled.fill_(rows.shape[1])


def gradients(loss: Tensor, *modules: nn.Module) -> dict[str, Tensor]:
    named = {f"{i}.{name}": p for i, module in enumerate(modules) for name, p in module.named_parameters()}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("queue_length", [0, 20])
@pytest.mark.parametrize(("global_crops", "local"), [(2, 0), (2, 3), (1, 1), (3, 2)])
def test_equals_the_plain_loop(global_crops, local, queue_length):
    objective, model = swav(projection="linear", queue_length=queue_length, global_crops=global_crops), Pooled()
    batch = crops_of(local, global_crops=global_crops)
    queue_scores = None
    if queue_length:
        rows = F.normalize(torch.randn(global_crops, queue_length, 6), dim=2)
        fill_queue(objective, rows)
        queue_scores = [objective.prototypes(part) for part in rows]
    expected = plain_loss(scores_of(objective, model, batch), queue_scores, global_crops)
    expected_gradients = gradients(expected, objective, model)
    loss = objective(model, batch)["loss"]
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    torch.testing.assert_close(gradients(loss, objective, model), expected_gradients, **TOLERANCE)
    assert expected_gradients["1.linear.weight"].abs().max() > 1e-3, "nothing would have been compared"


@pytest.mark.parametrize("queue_length", [0, 20])
@pytest.mark.parametrize("local", [0, 3])
def test_equals_lightly(local, queue_length):
    swav_loss = pytest.importorskip("lightly.loss.swav_loss", reason="needs the extra: pip install .[oracle]")
    oracle = swav_loss.SwaVLoss(sinkhorn_gather_distributed=True)
    objective, model, batch = swav(projection="linear", queue_length=queue_length), Pooled(), crops_of(local)
    queue_scores = None
    if queue_length:
        rows = F.normalize(torch.randn(2, queue_length, 6), dim=2)
        fill_queue(objective, rows)
        queue_scores = [objective.prototypes(part) for part in rows]
    scores = scores_of(objective, model, batch)
    expected = oracle(scores[:2], scores[2:], queue_scores)[0]
    expected_gradients = gradients(expected, objective, model)
    loss = objective(model, batch)["loss"]
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    torch.testing.assert_close(gradients(loss, objective, model), expected_gradients, **TOLERANCE)


def test_codes_carry_no_gradient_and_the_loss_is_least_where_predictions_are_the_codes():
    codes = torch.rand(2, 5, 4).softmax(2)
    scores = codes.flip(0).log().mul(0.1).requires_grad_()  # softmax(scores / .1) of one view: codes of the other
    loss = swapped_prediction_loss(scores, codes, 0.1)
    torch.testing.assert_close(loss, torch.special.entr(codes).sum(2).mean())
    (gradient,) = torch.autograd.grad(loss, scores)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)


def test_crops_of_one_size_go_through_the_model_together():
    model = Pooled()
    swav()(model, crops_of(local=3))
    assert model.sizes == [(2 * BATCH, 3, 16, 16), (3 * BATCH, 3, 8, 8)]


def test_crops_keep_their_order_where_sizes_alternate():
    objective, model, batch = swav(projection="linear"), Pooled(), crops_of(local=4)
    batch["crops"][3], batch["crops"][5] = (F.interpolate(batch["crops"][i], size=(4, 4)) for i in (3, 5))
    expected = plain_loss(scores_of(objective, model, batch), None)
    torch.testing.assert_close(objective(model, batch)["loss"], expected, **TOLERANCE)


def test_defaults_are_the_papers_but_for_the_projection():
    objective = create_objective("swav", feature_dim=64)
    assert [tuple(p.shape) for p in objective.head.parameters()][::4] == [(2048, 64), (128, 2048)]
    assert objective.prototypes.weight.shape == (500, 128)
    assert objective.queue.shape == (2, 512, 128)
    assert objective.options.freeze_prototypes_steps == 5005
    assert all(value.dtype in (torch.float32, torch.int64) for value in objective.state_dict().values())
    linear = create_objective("swav", feature_dim=64, options={"projection": "linear"})
    assert [tuple(p.shape) for p in linear.head.parameters()] == [(128, 64), (128,)]


def test_prototypes_have_length_one_before_every_step():
    objective = swav()
    with torch.no_grad():
        objective.prototypes.weight.mul_(3)
    objective.before_step(1)
    torch.testing.assert_close(objective.prototypes.weight.norm(dim=1), torch.ones(PROTOTYPES))


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_frozen_prototypes_do_not_move_for_exactly_n_steps(steps):
    objective, model = swav(freeze_prototypes_steps=steps), Pooled()
    start = objective.prototypes.weight.detach().clone()
    head = objective.head.projection[0].weight.detach().clone()
    parameters = [*model.parameters(), *objective.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
    moved = []
    for step in range(5):
        objective.before_step(step)
        objective(model, crops_of(seed=step))["loss"].backward()
        objective.after_backward(step)
        optimizer.step()
        optimizer.zero_grad()
        moved.append(not torch.equal(objective.prototypes.weight, start))
    assert moved == [step >= steps for step in range(5)]
    assert not torch.equal(objective.head.projection[0].weight, head)


def embeddings_of(objective: SwAV, model: nn.Module, batch: dict[str, list[Tensor]]) -> Tensor:
    return torch.stack([objective.head(model(crop)).detach() for crop in batch["crops"][:2]])


@pytest.mark.parametrize("length", [5, 8, 20])
def test_queue_rows_are_the_last_embeddings_in_order(length):
    objective, model = swav(projection="linear", queue_length=length, queue_from_step=1), Pooled()
    seen = []
    for step in range(4):
        objective.before_step(step)
        objective(model, crops_of(seed=step))
        if step >= 1:
            seen.append(embeddings_of(objective, model, crops_of(seed=step)))
        rows = torch.cat(seen, dim=1)[:, -length:] if seen else torch.zeros(2, 0, 6)
        assert int(objective.queue_filled) == rows.shape[1]
        torch.testing.assert_close(objective.queue[:, length - rows.shape[1] :], rows)
        assert not objective.queue[:, : length - rows.shape[1]].any()


def test_the_queue_counts_only_once_it_is_full():
    objective, model = swav(projection="linear", queue_length=16, queue_from_step=0), Pooled()
    bare = swav(projection="linear")
    bare.load_state_dict({k: v for k, v in objective.state_dict().items() if "queue" not in k}, strict=False)
    same = []
    for step in range(4):
        objective.before_step(step)
        bare.before_step(step)
        batch = crops_of(seed=step)
        same.append(torch.equal(objective(model, batch)["loss"], bare(model, batch)["loss"]))
    assert same == [True, True, False, False]


def test_the_queue_starts_at_its_fraction_of_the_run():
    objective, model = create_objective("swav", feature_dim=DIM, options={**SMALL, "queue_length": 8}), Pooled()
    with pytest.raises(RuntimeError, match=r"call begin\(total_steps\) before training, or set queue_from_step"):
        objective.before_step(0)
    objective.begin(10)
    for step in range(3):
        objective.before_step(step)
        objective(model, crops_of(seed=step))
        assert bool(objective.queue.any()) == (step >= 2)


def test_eval_mode_leaves_the_queue_alone():
    objective, model = swav(projection="linear", queue_length=8, queue_from_step=0), Pooled()
    fill_queue(objective, F.normalize(torch.ones(2, 8, 6), dim=2))
    before = objective.queue.clone()
    loss = objective.eval()(model, crops_of())["loss"]
    assert torch.equal(objective.queue, before)
    torch.testing.assert_close(loss, plain_loss(scores_of(objective, model, crops_of()), None), **TOLERANCE)


@pytest.mark.parametrize("how", ["load_state_dict", "in place"])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_state_dict_resumes_the_queue(how, stop):
    def steps(objective: SwAV, model: nn.Module, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            objective.before_step(step)
            losses.append(objective(model, crops_of(seed=step))["loss"].item())
        return losses

    model, options = Pooled(), {"queue_length": 16, "queue_from_step": 0}
    objective = swav(**options)
    steps(objective, model, 0, stop)
    state = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    resumed = swav(**options)
    steps(resumed, model, 0, 4)  # a full queue of its own, which must not be taken for the loaded one
    if how == "load_state_dict":
        resumed.load_state_dict(state)
    else:
        for name, tensor in resumed.state_dict().items():
            tensor.copy_(state[name])
        resumed.begin(6)
    assert steps(resumed, model, stop, 6) == steps(objective, model, stop, 6)
    assert all(torch.equal(resumed.state_dict()[name], value) for name, value in objective.state_dict().items())


def test_sinkhorn_and_loss_are_fp32_under_autocast():
    objective, model, batch = swav(projection="linear"), Pooled(), crops_of()
    with torch.autocast("cpu", torch.bfloat16):
        features = [model(crop) for crop in batch["crops"]]
        embeddings = [objective.head(f) for f in features]
        outputs = objective(model, batch)
        scores = objective.prototypes(embeddings[0])
    assert features[0].dtype == torch.bfloat16
    assert {embeddings[0].dtype, scores.dtype, outputs["loss"].dtype} == {torch.float32}
    # From the bf16 projection on, everything is what fp32 makes of it.
    expected = plain_loss([F.linear(e, objective.prototypes.weight) for e in embeddings], None)
    torch.testing.assert_close(outputs["loss"], expected, **TOLERANCE)
    outputs["loss"].backward()
    assert model.linear.weight.grad.abs().max() > 1e-3


def test_training_lowers_the_loss_and_reaches_the_model():
    objective, model = swav(), Pooled()
    images = torch.randn(16, 3, 16, 16)
    optimizer = torch.optim.SGD([*model.parameters(), *objective.parameters()], lr=0.1, momentum=0.9)
    losses = []
    for step in range(60):
        objective.before_step(step)
        views = [images + 0.1 * torch.randn_like(images) for _ in range(2)]
        outputs = objective(model, {"crops": views})
        outputs["loss"].backward()
        objective.after_backward(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs["loss"].item())
    assert losses[-1] < 0.6 * losses[0]
    assert objective.collapsed({name: value.item() for name, value in outputs.items()}) is None
    assert outputs["prototypes_used"] >= 5


def test_a_collapse_shows_and_is_explained():
    objective = swav()
    same = [torch.ones(BATCH, 3, 16, 16)] * 2
    logs = {name: value.item() for name, value in objective.eval()(Pooled(), {"crops": same}).items()}
    assert logs["codes_entropy"] == pytest.approx(math.log(PROTOTYPES), rel=1e-4)
    assert logs["prototypes_used"] <= PROTOTYPES // 2  # all are equal, so that rounding says which is the largest
    assert logs["loss"] >= 0.99 * math.log(PROTOTYPES)
    message = objective.collapsed(logs)
    assert "collapsed" in message
    assert "ln K = 2.079 for K = 8" in message
    assert "projection='mlp'" in message
    healthy = {name: value.item() for name, value in swav()(Pooled(), crops_of()).items()}
    assert healthy["codes_entropy"] < 0.9 * math.log(PROTOTYPES)
    assert healthy["prototypes_used"] > 3
    assert objective.collapsed(healthy) is None


def test_a_collapse_may_last_until_the_prototypes_move_or_half_of_a_short_run():
    objective = swav(freeze_prototypes_steps=100)
    for steps, grace in [(1000, 100), (120, 60)]:
        objective.begin(steps)
        assert objective.grace_steps == grace


def test_what_is_logged_is_a_detached_scalar():
    outputs = swav()(Pooled(), crops_of())
    assert set(outputs) == {"loss", "codes_entropy", "prototypes_used"}
    assert all(value.ndim == 0 for value in outputs.values())
    assert [name for name, value in outputs.items() if value.requires_grad] == ["loss"]


def test_too_few_rows_for_the_prototypes_are_refused():
    message = (
        "8 prototypes cannot each get an image: the batch has 4 images over all processes and the queue 3 rows. "
        "Set prototypes to 7 or less, enlarge the batch or queue_length, or set allow_few_rows=True."
    )
    small = crops_of(batch=4)
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        swav(queue_length=3, queue_from_step=0)(Pooled(), small)
    assert str(raised.value) == message
    assert swav(queue_length=6, queue_from_step=0)(Pooled(), small)["loss"].isfinite()
    assert swav(allow_few_rows=True)(Pooled(), small)["loss"].isfinite()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"pixel_values": torch.zeros(1)},
            r"swav needs batch\['crops'\], and the batch has \['pixel_values'\]",
        ),
        ({"crops": crops_of()["crops"][:1]}, "needs 2 global crops and 2 crops in all, the batch has 1: make more"),
        ({"crops": [*crops_of()["crops"][:2], torch.zeros(3, 3, 8, 8)]}, r"same images, got batch sizes \[8, 8, 3\]"),
        ({"crops": crops_of(local=2)["crops"][1:]}, r"global ones, of one size; got sizes \[\(16, 16\), \(8, 8\), "),
    ],
)
def test_a_batch_that_lacks_crops_is_named(batch, message):
    with pytest.raises(ValueError, match=message):
        swav()(Pooled(), batch)


def test_features_of_another_dimension_are_named():
    objective = create_objective("swav", feature_dim=DIM + 1, options={**SMALL})
    with pytest.raises(ValueError, match=r"features of shape \(batch, 13\), and the model returned \(16, 12\)"):
        objective(Pooled(), crops_of())
