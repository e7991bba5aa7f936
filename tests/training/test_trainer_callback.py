# SPDX-License-Identifier: Apache-2.0
"""A run of transformers' Trainer that is interrupted and resumed ends in the mask of the run that was not."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from smn_peft import MaskConfig
from smn_peft.storage.adapter_file import adapter_sizes, read_adapter_file
from smn_peft.training import ExactResumeCallback

STEPS, SAVED, STOPPED = 8, 4, 6  # a low init_score lets so few steps flip bits


class Interrupted(Exception):
    """What a run that is killed looks like from inside."""


class InterruptAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Interrupted


def vit() -> nn.Module:
    torch.manual_seed(1)
    config = ViTConfig(
        image_size=16,
        patch_size=8,
        num_channels=1,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_dropout_prob=0.1,  # so that resuming has to restore the random state too
        num_labels=3,
    )
    return get_peft_model(
        ViTForImageClassification(config), MaskConfig(init_score=0.02, modules_to_save=["classifier"])
    )


def resnet() -> nn.Module:
    torch.manual_seed(1)
    config = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    mask = MaskConfig(target_modules="all-conv", init_score=0.02, modules_to_save=["classifier"], batch_norm="adapt")
    return get_peft_model(ResNetForImageClassification(config), mask)


class Images(torch.utils.data.Dataset):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images, self.labels = torch.randn(24, 1, 16, 16, generator=generator), torch.arange(24) % 3

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def trainer(model: nn.Module, folder: Path, callbacks: list[TrainerCallback], **arguments) -> Trainer:
    scores = [p for name, p in model.named_parameters() if p.requires_grad and "smn_" in name]
    head = [p for name, p in model.named_parameters() if p.requires_grad and "smn_" not in name]
    optimizer = torch.optim.SGD([{"params": scores, "lr": 10.0}, {"params": head, "lr": 0.1}], momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    options = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        save_steps=SAVED,
        per_device_train_batch_size=8,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **arguments,
    )
    return Trainer(
        model,
        options,
        train_dataset=Images(),
        eval_dataset=Images(),
        callbacks=callbacks,
        optimizers=(optimizer, schedule),
    )


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that training changed: scores, head, statistics."""
    return {name: t.clone() for name, t in model.state_dict().items() if "smn_" in name or "modules_to_save" in name}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def run(build, folder: Path, exact: bool, interrupt: bool) -> tuple[nn.Module, Path]:
    """A whole run, uninterrupted or resumed in a model built anew; returns it and the folder it was exported to."""
    callbacks = [ExactResumeCallback()] if exact else []
    if interrupt:
        with pytest.raises(Interrupted):
            trainer(build(), folder, [*callbacks, InterruptAt(STOPPED)]).train()
    model = build()
    runner = trainer(model, folder, callbacks)
    runner.train(resume_from_checkpoint=interrupt or None)
    assert runner.state.global_step == STEPS
    runner.save_model(str(folder / "exported"))
    return model, folder / "exported"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Function that gives a whole run, which is done once: its model and the folder that it was exported to."""

    @functools.cache
    def trained(build, exact):
        return run(build, tmp_path_factory.mktemp("whole"), exact=exact, interrupt=False)

    return trained


@pytest.mark.parametrize("build", [vit, resnet])
def test_an_interrupted_run_ends_as_the_whole_one_does_bit_for_bit(build, tmp_path, uninterrupted):
    whole, exported = uninterrupted(build, True)
    resumed, exported_too = run(build, tmp_path / "resumed", exact=True, interrupt=True)
    assert differing(trained_state(whole), trained_state(resumed)) == []
    assert whole.density() < 1
    assert (exported / "adapter_model.safetensors").read_bytes() == (
        exported_too / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.filterwarnings("ignore:Adapter 'default' was saved as bits")
def test_without_the_callback_it_ends_elsewhere(tmp_path, uninterrupted):
    whole, _ = uninterrupted(vit, False)
    resumed, _ = run(vit, tmp_path / "resumed", exact=False, interrupt=True)
    assert any("smn_scores" in name for name in differing(trained_state(whole), trained_state(resumed)))
    masks = zip(whole.masks().values(), resumed.masks().values(), strict=True)
    assert sum(int((one != other).sum()) for one, other in masks) > 0


def test_the_callback_changes_nothing_but_the_checkpoints(uninterrupted):
    plain, exported = uninterrupted(vit, False)
    exact, exported_too = uninterrupted(vit, True)
    assert differing(trained_state(plain), trained_state(exact)) == []
    assert read_adapter_file(exported).keys() == read_adapter_file(exported_too).keys()


def test_checkpoints_hold_scores_and_what_is_exported_does_not(uninterrupted):
    model, exported = uninterrupted(vit, True)
    assert adapter_sizes(exported.parent / f"checkpoint-{STEPS}").scores > 0
    assert adapter_sizes(exported).scores == 0
    assert json.loads((exported / "adapter_config.json").read_text())["save_scores"] is False
    assert model.peft_config["default"].save_scores is False


def test_a_checkpoint_loads_for_inference_as_the_exported_adapter_does(uninterrupted):
    model, exported = uninterrupted(vit, True)
    pixels = Images().images
    with torch.no_grad():
        expected = model.eval()(pixels).logits
        for folder in (exported, exported.parent / f"checkpoint-{STEPS}"):
            loaded = PeftModel.from_pretrained(vit().unload(), folder).eval()
            assert torch.equal(loaded(pixels).logits, expected)


def test_save_scores_that_was_asked_for_stays(tmp_path):
    model = vit()
    model.peft_config["default"].save_scores = True
    trainer(model, tmp_path, [ExactResumeCallback()]).train()
    assert model.peft_config["default"].save_scores is True


def test_after_an_interrupted_run_the_next_one_sets_it_back(tmp_path):
    model, callback = vit(), ExactResumeCallback()
    with pytest.raises(Interrupted):
        trainer(model, tmp_path / "one", [callback, InterruptAt(STOPPED)]).train()
    trainer(model, tmp_path / "two", [callback]).train()
    assert model.peft_config["default"].save_scores is False


def test_the_best_model_is_loaded_at_the_end_with_its_scores(tmp_path):
    model = vit()
    runner = trainer(
        model,
        tmp_path,
        [ExactResumeCallback()],
        eval_strategy="steps",
        eval_steps=SAVED,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the highest loss, so that the best checkpoint is not the last
    )
    runner.train()
    assert runner.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{SAVED}")
    best = read_adapter_file(runner.state.best_model_checkpoint)
    scores = {name: t for name, t in model.named_parameters() if "smn_scores" in name}
    assert scores
    for name, value in scores.items():
        assert torch.equal(value, best[name.removesuffix(".default")])


def test_a_model_without_a_mask_that_trains_is_refused(tmp_path):
    message = "found no mask adapter that trains: wrap the model with get_peft_model"
    model = vit()
    model.save_pretrained(tmp_path / "adapter")
    for other in (nn.Linear(2, 2), PeftModel.from_pretrained(vit().unload(), tmp_path / "adapter")):
        with pytest.raises(ValueError, match=message):
            ExactResumeCallback().on_train_begin(None, None, None, model=other)
