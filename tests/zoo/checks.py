# SPDX-License-Identifier: Apache-2.0
"""What is tried on every model of the zoo, each against a copy of the model that is masked by hand."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import smn_peft
from smn_peft import MaskConfig
from smn_peft.bank.bank import MaskBank
from tests.processes import ROOT
from tests.training.tiny import environment
from tests.zoo.models import BY_NAME, Entry

__all__ = ["CHECKS", "Trial", "is_bad", "reload_all", "try_model"]

CHECKS = {
    "forward": "the masked forward is that of a copy whose weights are param · mask / σ",
    "step": "a training step: scores get a gradient wherever the copy's weights do, the base stays, the mask follows",
    "merge": "merged it gives the same, and unmerging gives the base back to the bit",
    "bank": "a bank's `use` is the copy, and gives the base back to the bit",
    "mixed": "`adapter_names` gives each row its own adapter, or is refused with the way out",
    "bank mixed": "`MaskBank.forward` gives each row its own task, or is refused with the way out",
    "reload": "saved, and loaded in a fresh process over the same base, the outputs are the same to the bit",
}
_HOUSES = tuple(str(Path(package.__file__ or "").parent) for package in (smn_peft, peft))


def is_bad(verdict: str) -> bool:
    """Whether somebody would get a wrong answer, or an error that does not say what to do."""
    return verdict.startswith(("wrong", "crash"))


def verdict_of(error: Exception) -> str:
    """A refusal is a ValueError or TypeError of this package or of PEFT, with a sentence; all else is a crash."""
    text = " ".join(str(error).split())
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "" if trace is None else trace.tb_frame.f_code.co_filename
    clear = isinstance(error, (ValueError, TypeError)) and place.startswith(_HOUSES) and len(text.split()) > 7
    return f"refused: {text[:110]}" if clear else f"crash: {type(error).__name__}: {text[:160]} ({Path(place).name})"


class Trial:
    """A model under a mask of random scores, beside the copies that it is compared with.

    Attributes:
        plain: The base, never touched.
        base: The base that goes under the mask.
        x: A batch of three.
    """

    def __init__(self, entry: Entry, folder: Path) -> None:
        """Build the base; `folder` is where the adapter is saved."""
        self.entry, self.folder = entry, folder
        self.base = entry.build()
        self.plain = copy.deepcopy(self.base)
        self.x = entry.inputs()
        self.y = forward(self.plain, self.x)
        self.model: Any = None

    def wrap(self) -> str | None:
        """Put the mask over it, on the architecture's default layers; where it has none on all but the head."""
        config = {"init_weights": False, "seed": 1}
        try:
            self.model = get_peft_model(self.base, MaskConfig(**config))
        except ValueError:
            self.base = copy.deepcopy(self.plain)
            head = sorted(name for name, _ in self.base.named_modules() if name)[-1:]
            kinds = (nn.Linear, nn.Conv2d)
            names = [n for n, m in self.base.named_modules() if type(m) in kinds and n not in head]
            if not names:
                raise
            self.model = get_peft_model(self.base, MaskConfig(target_modules=names, **config))
        self.model.eval()
        return None

    def by_hand(self) -> nn.Module:
        """The masked model, written out."""
        hand = copy.deepcopy(self.plain)
        with torch.no_grad():
            for name, mask in self.model.base_model.masks().items():
                parameter, active = hand.get_parameter(name), mask.float().mean()
                parameter.copy_(parameter * mask / active.sqrt() if active > 0 else torch.zeros_like(parameter))
        return hand

    def forward(self) -> str | None:
        """See `CHECKS`."""
        want = forward(self.by_hand(), self.x)
        if not torch.isfinite(want).all() or differs(want, self.y) is None:
            return "the mask makes no difference here: the zoo's weights are no test"
        return differs(forward(self.model, self.x), want)

    def step(self) -> str | None:
        """See `CHECKS`."""
        hand = self.by_hand()
        masked = [hand.get_parameter(name).requires_grad_(True) for name in self.model.base_model.masks()]
        loss_of(hand.train(), self.x).backward()
        used = sum(parameter.grad is not None for parameter in masked)
        scores = [p for name, p in self.model.named_parameters() if name.rpartition(".")[0].endswith("scores")]
        optimizer = torch.optim.Adam(scores, lr=0.02)
        self.model.train()
        loss_of(self.model, self.x).backward()
        got = sum(score.grad is not None for score in scores)
        before = {name: mask.clone() for name, mask in self.model.base_model.masks().items()}
        optimizer.step()
        optimizer.zero_grad()
        self.model.eval()
        if got != used or not used:
            return f"{got} of {len(scores)} scores got a gradient, and {used} of the weights of the copy"
        if all(torch.equal(mask, before[name]) for name, mask in self.model.base_model.masks().items()):
            return "the step moved no bit"
        if (changed := unlike(self.model, self.plain)) is not None:
            return f"the step changed the base: {changed}"
        return differs(forward(self.model, self.x), forward(self.by_hand(), self.x))

    def merge(self) -> str | None:
        """See `CHECKS`."""
        before = forward(self.model, self.x)
        self.model.merge_adapter()
        merged = forward(self.model, self.x)
        self.model.unmerge_adapter()
        if (wrong := differs(merged, before)) is not None:
            return f"merged, {wrong}"
        if (changed := unlike(self.model, self.plain)) is not None:
            return f"unmerged, the base differs: {changed}"
        return None if torch.equal(forward(self.model, self.x), before) else "unmerged, other outputs than before"

    def save(self) -> None:
        """Write the adapter, and what it gives, for [`reload_all`]."""
        self.model.save_pretrained(str(self.folder), save_embedding_layers=False)
        outputs = {"plain": self.y, "masked": forward(self.model, self.x)}
        save_file({name: value.contiguous() for name, value in outputs.items()}, self.folder / "outputs.safetensors")

    def bank(self) -> str | None:
        """See `CHECKS`."""
        own = copy.deepcopy(self.plain)
        with MaskBank.open([], own) as bank:
            bank.add("a", self.folder)
            with bank.use("a") as model:
                got = forward(model, self.x)
            if not torch.equal(forward(own, self.x), self.y):
                return "after use, the base gives other outputs"
        if (changed := unlike(own, self.plain)) is not None:
            return f"after closing, the base differs: {changed}"
        return differs(got, forward(self.by_hand(), self.x))

    def mixed(self) -> str | None:
        """See `CHECKS`."""
        with torch.no_grad():
            got = output_of(self.model(self.x, adapter_names=["default", "__base__", "default"]))
        return self._rows(got)

    def bank_mixed(self) -> str | None:
        """See `CHECKS`."""
        with MaskBank.open([], copy.deepcopy(self.plain)) as bank:
            bank.add("a", self.folder)
            return self._rows(output_of(bank.forward(self.x, ["a", None, "a"])))

    def _rows(self, got: Tensor) -> str | None:
        want = forward(self.by_hand(), self.x)
        rows = torch.stack([want[0], self.y[1], want[2]])
        wrong = [f"row {row}: {found}" for row in range(3) if (found := differs(got[row], rows[row])) is not None]
        return "; ".join(wrong) or None


def forward(model: nn.Module, x: Tensor) -> Tensor:
    """Outputs without gradients."""
    with torch.no_grad():
        return output_of(model(x)).clone()


def output_of(output: Any) -> Tensor:
    """The tensor that a model's output is judged by."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "image_embeds", "last_hidden_state"):
        if isinstance(found := getattr(output, name, None), Tensor):
            return found
    if isinstance(output, (tuple, list)):  # of two heads, both
        return torch.stack([part for part in output if isinstance(part, Tensor)], 1)
    raise TypeError(f"{type(output).__name__} has none of the known outputs")


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """A loss that every output counts in, each by another weight."""
    output = output_of(model(x))
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    return (output * weights).sum()


def differs(got: Tensor, want: Tensor) -> str | None:
    """How far apart, relative to the largest value; None where that is rounding."""
    if got.shape != want.shape:
        return f"shape {tuple(got.shape)}, not {tuple(want.shape)}"
    largest = max(float(want.abs().max()), 1e-6)
    distance = float((got - want).abs().max()) / largest
    return None if distance < 1e-3 else f"off by {distance:.1e} of the largest value"


def unlike(model: nn.Module, plain: nn.Module) -> str | None:
    """The first tensor of the base that is not what it was, to the bit."""
    for name, tensor in named(plain):
        *path, last = name.split(".")
        owner = _bare(model)
        for part in path:
            owner = _bare(getattr(owner, part))
        if not torch.equal(getattr(owner, last), tensor):
            return name
    return None


def _bare(module: Any) -> Any:
    """The module itself, of a wrapper what it is around; other people's modules may be called `base_layer` too."""
    if isinstance(module, PeftModel):
        return module.get_base_model()
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def named(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Parameters and buffers."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def attempt(check: Callable[[], str | None]) -> str:
    """The verdict of one check."""
    try:
        wrong = check()
    except Exception as error:
        return verdict_of(error)
    return "ok" if wrong is None else f"wrong: {wrong}"


def try_model(entry: Entry, folder: Path) -> dict[str, str]:
    """The verdict of every check but "reload", which [`reload_all`] makes of what is saved in the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trial = Trial(entry, folder)
        if (wrapped := attempt(trial.wrap)) != "ok":
            return dict.fromkeys(CHECKS, wrapped)
        found = {name: attempt(getattr(trial, name)) for name in ("forward", "step", "merge")}
        saved = attempt(trial.save)
        for name, check in (("bank", trial.bank), ("mixed", trial.mixed), ("bank mixed", trial.bank_mixed)):
            found[name] = attempt(check) if saved == "ok" or name == "mixed" else saved
        # What failed half-way must leave the model as it was.
        if saved == "ok" and not torch.equal(forward(trial.model, trial.x), load_file(folder / OUTPUTS)["masked"]):
            found["mixed"] = f"wrong: afterwards the model gives other outputs ({found['mixed']})"
        return {**found, "reload": saved}


OUTPUTS = "outputs.safetensors"


def reload_all(folders: dict[str, Path]) -> dict[str, str]:
    """Verdicts of "reload" by name, all in one fresh process."""
    line = [sys.executable, "-m", "tests.zoo.checks", json.dumps({name: str(path) for name, path in folders.items()})]
    done = subprocess.run(line, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _reload(name: str, folder: Path) -> str | None:
    entry, expected = BY_NAME[name], load_file(folder / OUTPUTS)
    base = entry.build()
    if not torch.equal(forward(base, entry.inputs()), expected["plain"]):
        return "the base alone gives other outputs than in the process that saved"
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    same = torch.equal(forward(model, entry.inputs()), expected["masked"])
    return None if same else differs(forward(model, entry.inputs()), expected["masked"]) or "other in the last bits"


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    todo = json.loads(sys.argv[1])
    print(json.dumps({name: attempt(lambda name=name: _reload(name, Path(todo[name]))) for name in todo}))  # type: ignore[misc]
