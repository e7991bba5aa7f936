# SPDX-License-Identifier: Apache-2.0
"""`TrainingTask`: model and objective as one module, which one wrapper (DDP, autocast) sees; and its optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from ..backbones import pooled_features
from ..functional.distributed import overwrite, unsharded
from ..functional.packing import round_stochastically
from ..objectives import Objective
from ..storage.adapter_file import narrowed
from ..tuner import MaskConfig, round_extras
from ..tuner.batch_norm import has_statistics
from .adapters import trained_names
from .arguments import LoopArguments
from .budget import BytesBudget, FlopsBudget


class TrainingTask(nn.Module):
    """What the loop trains: a batch goes in, ``{"loss": …}`` comes out.

    Attributes:
        model: A vision model: under an adapter, or bare for the baselines.
        objective: Turns the model's features or logits into a loss.
        adapt_statistics: Whether the BatchNorm statistics of a bare model adapt, whichever of its weights train; None:
            if any weight does.
        base: Fingerprint of the frozen base, by which a resumed run knows it; None if not computed.
        bound: Factor of the distance from the start's features in the loss; None without, see [`set_bound`].
        budget: What makes the mask meet a size of its file, or a share of multiplications; None without.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        adapt_statistics: bool | None = None,
        base: str | None = None,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.objective: Any = objective
        self.adapt_statistics, self.base = adapt_statistics, base
        self._run = self._outputs
        self.bound: float | None = None
        self.budget: BytesBudget | FlopsBudget | None = None
        # No buffers: DDP would send them to every process in every step.
        self.start_features, self.start_variance = torch.empty(0), 1.0

    def set_bound(self, weight: float, features: Tensor) -> None:
        """Bound how far training moves the features: add weight / images · distance from `features` to the loss.

        The distance is ‖f − start‖² over images and features, divided by the features' variance over the training
        images, both as means: the penalty of Li et al. (DELTA, 2019) without attention, free of the features' size.
        A prior counts in a sum over images once, so in their mean it counts less the more there are.

        Args:
            weight: Factor of the distance, times the number of training images.
            features: The start's, fp32 (training images, dim), by ``batch["index"]``.

        Raises:
            ValueError: If the objective takes several views of an image.
        """
        if self.objective.views != "one":
            raise ValueError(f"bound needs one view per image, and {self.objective.name} has several: leave it out.")
        self.bound = weight / len(features)
        self.start_features, self.start_variance = features, float(features.var(0).mean())

    def train(self, mode: bool = True) -> TrainingTask:
        """Set train mode, but keep what has no trainable weight in eval mode, or its BatchNorm statistics would move.

        That is a frozen backbone and, under an adapter other than a mask or with a bound, every BatchNorm. A mask
        adapter has a policy of its own.
        """
        super().train(mode)
        if self.adapt_statistics:
            return self
        for part in self.model.children():
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        other = isinstance(self.model, PeftModel) and self.mask_config is None
        if self.adapt_statistics is False or self.bound is not None or other:
            for module in self.model.modules():
                if has_statistics(module):
                    module.eval()
        return self

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the model's forward; the objective, which gathers over processes, stays as it is."""
        self._run = torch.compile(self._outputs, *args, **kwargs)

    def features(self, pixel_values: Tensor) -> Tensor:
        """Pooled features (batch, dim) of images, for evaluations: under FSDP2 `model` alone would be in parts."""
        return pooled_features(self.model, pixel_values)

    def _outputs(self, pixel_values: Tensor) -> Tensor:
        if self.objective.consumes == "features" or self.bound is not None:
            return pooled_features(self.model, pixel_values)
        output = self.model(pixel_values)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Loss of a batch and scalars to log, among them its terms ``"distance"``, ``"rate"`` and ``"flops"``."""
        found: dict[str, Tensor] = self.objective(self._run, batch) if self.bound is None else self._bounded(batch)
        rate = None if self.mask_config is None else self.model.rate()
        terms = {"rate": rate, "flops": None if self.budget is None else self.budget.term(self.model)}
        for name, term in terms.items():
            if term is not None:
                found = {**found, "loss": found["loss"] + term, name: term.detach()}
        return found

    def _bounded(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The objective's, with the distance of the features from the start's in the loss."""
        assert self.bound is not None
        seen: list[Tensor] = []

        def model(pixel_values: Tensor) -> Tensor:
            seen.append(self._run(pixel_values))
            return self._head(seen[0]) if self.objective.consumes == "logits" else seen[0]

        found = self.objective(model, batch)
        self.start_features = self.start_features.to(seen[0].device)
        distance = (seen[0].float() - self.start_features[batch["index"]]).square().mean() / self.start_variance
        return {**found, "loss": found["loss"] + self.bound * distance, "distance": distance.detach()}

    def _head(self, features: Tensor) -> Tensor:
        base: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        logits: Tensor = base.forward_head(features)
        return logits

    @torch.no_grad()
    def logits_of(self, features: Tensor) -> Tensor:
        """Pooled features (n, dim) -> logits (n, classes), both fp32 on the CPU; needs an objective with labels."""
        device = next(self.model.parameters()).device
        head = self._head if self.objective.consumes == "logits" else self.objective.logits
        return torch.cat([head(part.to(device)).float().cpu() for part in features.split(4096)])

    def before_step(self, step: int, steps: int) -> None:
        """Set the density of a progressive mask, or the rate of one with a budget, for a step of so many."""
        config = self.mask_config
        if config is not None and config.density_schedule is not None:
            self.model.update_density(step / max(1, steps - 1))
        if self.budget is not None:
            self.budget.before_step(self.model, step, steps)

    def finish(self, steps: int) -> None:
        """Make the mask what it is to be at the end, after so many steps."""
        self.before_step(steps - 1, steps)  # for a run that is resumed at its end
        if self.budget is not None:
            self.budget.finish(self.model, [parameter for _, parameter, is_score in self.trainable() if is_score])

    @property
    def mask_config(self) -> MaskConfig | None:
        """Configuration of the active mask adapter, or None."""
        config = self.model.active_peft_config if isinstance(self.model, PeftModel) else None
        return config if isinstance(config, MaskConfig) else None

    def density(self) -> float | None:
        """Fraction of the masked weights that are active; None without a mask."""
        return None if self.mask_config is None else self.model.density()

    def bits_per_weight(self) -> float | None:
        """Entropy of the masks in bits per weight; None without a mask."""
        return None if self.mask_config is None else self.model.bits_per_weight()

    def trainable(self) -> Iterator[tuple[str, nn.Parameter, bool]]:
        """(name, parameter, whether it is a score or adapted weight rather than head or objective)."""
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            head = name.startswith(("objective.", "model.head.")) or ".modules_to_save." in name
            yield name, parameter, "scores" in name and ".smn_" in name if self.mask_config is not None else not head

    def training_state(self) -> dict[str, Tensor]:
        """All that training changes, by name: scores, head, objective, statistics; never the frozen base."""
        parameters, adapter = dict(self.named_parameters(remove_duplicate=False)), isinstance(self.model, PeftModel)

        def changes(name: str) -> bool:
            if name.startswith(("objective.", "budget.")):
                return True
            if name in parameters:
                return parameters[name].requires_grad
            return not adapter or any(
                part in name for part in (".smn_running_", ".smn_num_batches", ".modules_to_save.")
            )

        return {name: tensor for name, tensor in self.state_dict(keep_vars=True).items() if changes(name)}

    def trained_tensors(self) -> dict[str, Tensor]:
        """What training changes of the model and is saved, by its name there."""
        if isinstance(self.model, PeftModel):
            state, start = self.training_state(), "model."
            return {name.removeprefix(start): state[name].detach() for name in state if name.startswith(start)}
        state = self.model.state_dict()
        return {name: state[name] for name in trained_names(self.model, statistics=bool(self.adapt_statistics))}

    @torch.no_grad()
    def round(self, save_dtype: str) -> None:
        """Round what training changed of the model to the dtype that it is saved in, in place; objectives stay.

        The tensors keep their dtype: evaluate after this call, and what is measured is what is saved. A mask's config
        has a `save_dtype` of its own. ValueError if a value is beyond what the dtype can hold.
        """
        if self.mask_config is not None:
            round_extras(self.model)
        elif save_dtype != "float32":
            for name, tensor in self.trained_tensors().items():
                overwrite(tensor, narrowed(name, unsharded(tensor), save_dtype))

    def saved_tensors(self, save_dtype: str) -> dict[str, Tensor]:
        """Tensors by name to save: all of a `PeftModel`, which saves its part; rounded where a mask does not do it."""
        if self.mask_config is not None:
            return dict(self.model.state_dict())
        trained = self.trained_tensors().items()
        narrow = {name: narrowed(name, unsharded(tensor), save_dtype) for name, tensor in trained}
        return {**self.model.state_dict(), **narrow} if isinstance(self.model, PeftModel) else narrow


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Have the model recompute its activations in backward; ValueError if timm and transformers cannot."""
    module: Any
    for module in model.modules():
        if hasattr(module, "set_grad_checkpointing"):  # timm
            module.set_grad_checkpointing(True)
            return
        if getattr(module, "supports_gradient_checkpointing", False):  # transformers
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            return
    raise ValueError(f"{type(model).__name__} has no gradient checkpointing: leave it off, or split by accumulate.")


# --- Optimizer -------------------------------------------------------------------------------------------------------


def build_optimizer(
    task: TrainingTask, arguments: LoopArguments, *, will_shard: bool = False
) -> torch.optim.Optimizer:
    """Create SGD or AdamW over two groups, each with its peak rate as `peak_lr`; ValueError if nothing trains.

    Steps are fused where they can be: not those of SGD over a task that FSDP2 `will_shard`.
    """
    rates = {True: ("scores", arguments.lr, arguments.weight_decay)}
    rates[False] = ("head", arguments.head_lr, arguments.head_weight_decay)
    groups: list[dict[str, Any]] = []
    for adapted, (name, lr, decay) in rates.items():
        if members := [parameter for _, parameter, kind in task.trainable() if kind == adapted]:
            groups.append({"params": members, "lr": lr, "peak_lr": lr, "weight_decay": decay, "name": name})
    if not groups:
        fix = "Wrap the model with get_peft_model(model, MaskConfig(…)), or call model.requires_grad_(True)."
        raise ValueError(f"Nothing to train: every parameter is frozen. {fix}")
    options: dict[str, Any] = {"lr": arguments.lr}
    if arguments.optimizer == "sgd":
        options["momentum"] = arguments.momentum
    if arguments.score_dtype == "bfloat16":
        groups[0]["rounding_seed"] = arguments.seed
        return (NarrowSGD if arguments.optimizer == "sgd" else NarrowAdamW)(groups, **options)
    # One pass over memory: a third to a fifth of AdamW's time on a CPU, where torch's default is a loop of many.
    parameters = [parameter for group in groups for parameter in group["params"]]
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters) or None
    if arguments.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=fused, **options)
    fused = None if will_shard else fused
    sgd = torch.optim.SGD(groups, fused=fused, **options)
    if fused and arguments.momentum:
        # The fused step refuses a parameter whose first gradient comes later than the others'. Zeros change no number.
        for parameter in parameters:
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def warmup_cosine(position: float, total: float, warmup: float = 0.0) -> float:
    """Factor of the learning rate, 0 to 1, after `position` of `total` units: linear warm-up, then a cosine to 0.

    All arguments are in one unit, steps or epochs. The warm-up starts at 1/W; the authors' code (section 4.1) starts
    at 0/W and so spends its first epoch at learning rate 0.
    """
    if position < warmup:
        return min(1.0, (position + 1) / warmup)
    if total <= warmup:
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (position - warmup) / (total - warmup))))


# --- Scores and their optimizer state in bf16: steps in fp32, rounded stochastically ---------------------------------


def cast_scores(task: TrainingTask, dtype: torch.dtype) -> None:
    """Convert the scores that train, in place."""
    for _, parameter, is_scores in task.trainable():
        if is_scores:
            parameter.data, parameter.grad = parameter.data.to(dtype), None


class _Narrow(torch.optim.Optimizer):
    """Step bf16 parameters in fp32, one after the other so that only one fp32 copy exists, and round stochastically.

    The noise depends on the first group's `rounding_seed` and `rounding_step`, which checkpoints keep, and not on the
    process, so replicas stay equal.
    """

    param_groups: list[dict[str, Any]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step every parameter that has a gradient; see `torch.optim.Optimizer.step`."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        groups, generators = self.param_groups, {}
        first = groups[0]
        first["rounding_step"] = first.get("rounding_step", 0) + 1
        seeds = np.random.SeedSequence([first.get("rounding_seed", 0), first["rounding_step"]])
        pairs = [(parameter, group) for group in groups for parameter in group["params"] if parameter.grad is not None]
        try:
            for parameter, group in pairs:
                if (device := parameter.device) not in generators:
                    generators[device] = torch.Generator(device).manual_seed(int(seeds.generate_state(1)[0]))
                narrow = parameter.dtype == torch.bfloat16
                wide: Any = nn.Parameter(parameter.float()) if narrow else parameter
                self.param_groups = [{**group, "params": [wide]}]
                if narrow:
                    wide.grad = parameter.grad.float()
                    self.state[wide] = {name: value.float() for name, value in self.state[parameter].items()}
                super().step()
                if narrow:
                    parameter.copy_(round_stochastically(wide, generators[device]))
                    for name, value in self.state.pop(wide).items():
                        new = round_stochastically(value, generators[device]) if value.ndim else value
                        self.state[parameter][name] = new
        finally:
            self.param_groups = groups
        return loss


class NarrowSGD(_Narrow, torch.optim.SGD):
    """SGD whose bf16 parameters have a bf16 momentum."""


class NarrowAdamW(_Narrow, torch.optim.AdamW):
    """AdamW whose bf16 parameters have bf16 moments."""
