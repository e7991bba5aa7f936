# SPDX-License-Identifier: Apache-2.0
"""Masks under FSDP2 on two gloo processes: one process' training, numbers and files; what else is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from smn_peft import MaskConfig, round_extras
from tests.gloo import run_processes

FILES = ("adapter_model.safetensors", "adapter_config.json")
CONFIGS: dict[str, dict[str, Any]] = {
    "weights": {"mask_bias": True, "codec": "entropy", "rate": 0.01},
    "rows": {"granularity": "row"},
    "columns": {"granularity": "column+weight"},
    "topk": {"mask_type": "topk", "density": 0.3, "init_score": "kaiming_uniform"},
    "random part": {"trainable_fraction": 0.5, "rate": 0.01},
    "large part": {"trainable_fraction": 0.5, "select": "magnitude"},
    "2:4": {"granularity": "2:4"},
}
STEPS = 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.BatchNorm1d(12), nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(self.norm(x))))


def masked(**options: Any) -> PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 12), Block(), Block(), nn.Linear(12, 3)).double()
    options = {"target_modules": ["first", "second"], "modules_to_save": ["3"], "save_dtype": "bfloat16", **options}
    return get_peft_model(base, MaskConfig(**options))


def sharded(model: Any) -> Any:
    for module in [module for module in model.modules() if isinstance(module, Block)]:
        fully_shard(module)
    return fully_shard(model)


def batch(rank: int, processes: int) -> tuple[Tensor, Tensor]:
    images = torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return images.chunk(processes)[rank], (torch.arange(8) % 3).chunk(processes)[rank]


def trained(model: Any, optimizer: type = torch.optim.SGD, **options: Any) -> list[float]:
    """Losses of a few steps; every process has its share of the batch."""
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    images, labels = batch(rank, processes)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps, losses = optimizer(parameters, lr=10.0, **options), []
    for _ in range(STEPS):
        loss = F.cross_entropy(model(images), labels)
        if (rate := model.rate()) is not None:
            loss = loss + rate
        loss.backward()
        steps.step()
        steps.zero_grad()
        mean = loss.detach().clone()
        if processes > 1:
            dist.all_reduce(mean)
        losses.append(float(mean) / processes)
    return losses


def save(model: Any, folder: Path, **options: Any) -> None:
    model.save_pretrained(folder, save_embedding_layers=False, **options)


def numbers(model: Any) -> dict[str, Tensor]:
    found = {"density": model.density(), "bits": model.bits_per_weight()}
    found["rate"] = 0.0 if (rate := model.rate()) is None else rate.detach()
    return {name: torch.tensor(float(value), dtype=torch.float64) for name, value in found.items()}


def train_and_save(name: str, folder: Path) -> dict[str, Tensor]:
    """A training with the numbers that users read and the files that they save, the ways that they save them."""
    alone = not dist.is_initialized()
    model = masked(**CONFIGS[name])
    model = model if alone else sharded(model)
    found = {"losses": torch.tensor(trained(model, momentum=0.9), dtype=torch.float64), **numbers(model)}
    with torch.no_grad():
        model.eval()(batch(0, 1)[0])
    found |= {f"{key} after a forward": value for key, value in numbers(model).items()}
    found["rounded"] = torch.tensor(round_extras(model))
    main = alone or dist.get_rank() == 0
    save(model, folder / f"{name} together", is_main_process=main)
    if not alone:
        # As accelerate and transformers' Trainer save: gathered for the main process, which goes on alone.
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        gathered = get_model_state_dict(model, options=options)
        with torch.no_grad():  # leaves tensors of the root gathered
            model(batch(0, 1)[0])
        if main:
            save(model, folder / f"{name} gathered", state_dict=gathered)
    return found


def train_all(folder: Path) -> dict[str, Tensor]:
    return {f"{name}, {key}": value for name in CONFIGS for key, value in train_and_save(name, folder).items()}


def test_two_processes_train_and_save_what_one_does(tmp_path):
    one = {name: train_and_save(name, tmp_path / "one") for name in CONFIGS}
    two = run_processes(train_all, 2, tmp_path, tmp_path / "two")
    for name in CONFIGS:
        for key, value in one[name].items():
            for rank in two:
                torch.testing.assert_close(rank[f"{name}, {key}"], value, rtol=1e-9, atol=1e-9)
        for file in FILES:
            wanted = (tmp_path / "one" / f"{name} together" / file).read_bytes()
            assert (tmp_path / "two" / f"{name} together" / file).read_bytes() == wanted, name
            assert (tmp_path / "two" / f"{name} gathered" / file).read_bytes() == wanted, name
        assert 0 < one[name]["density"] < 1


def refuse_all(folder: Path) -> dict[str, Tensor]:
    """What cannot be right is refused by name; with two processes, where an engine does nothing with one."""
    images, _ = batch(0, 1)
    rounding = masked(threshold=0.5)
    layer = rounding.get_base_model().get_submodule("1.first")
    fully_shard(layer, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"'1.first' is computed with scores that FSDP2 rounds.*param_dtype=None"):
        fully_shard(rounding)(images)

    single = masked()
    for name in ("1.first", "1.second"):
        layer = single.get_base_model().get_submodule(name)
        fully_shard(layer.base_layer)
    with pytest.raises(ValueError, match=r"'1.first' is sharded in its own forward.*not single layers"):
        fully_shard(single)(images)
    past = sharded(masked())
    with pytest.raises(ValueError, match=r"'1.first' is sharded in its own forward.*call the module that was given"):
        past.get_base_model()[1].first(torch.zeros(2, 12, dtype=torch.float64))

    mesh = init_device_mesh("cpu", (2,))
    parallel = masked()
    parallelize_module(parallel.get_base_model()[1].first.base_layer, mesh, ColwiseParallel())
    with pytest.raises(ValueError, match=r"'1.first' is sharded in its own forward.*merge_and_unload\(\) first"):
        parallel(images)
    merged = masked(init_weights=False).merge_and_unload().eval()
    expected = merged(images)
    parallelize_module(merged[1], mesh, {"first": ColwiseParallel(), "second": RowwiseParallel()})
    torch.testing.assert_close(merged(images), expected)

    flat = FullyShardedDataParallel(masked(), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(ValueError, match=r"'1.first' is flattened by FSDP1.*--fsdp_version 2"):
        flat(images)

    model = sharded(masked())
    with pytest.raises(ValueError, match=r"is sharded already: merge before the model is sharded"):
        model.merge_adapter()
    with pytest.raises(ValueError, match=r"add an adapter that trains before"):
        model.add_adapter("other", MaskConfig(target_modules=["first"]))
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match=r"load or set masks that train before"):
        set_peft_model_state_dict(model, load_file(folder / "bits.safetensors"))
    model(images)
    return {}


def test_what_is_refused_under_fsdp(tmp_path):
    save_file(get_peft_model_state_dict(masked(init_weights=False)), tmp_path / "bits.safetensors")
    run_processes(refuse_all, 2, tmp_path, tmp_path)


def load_and_answer(folder: Path) -> dict[str, Tensor]:
    """Logits of loaded adapters, one for inference and one to train, that are sharded afterwards."""
    found: dict[str, Tensor] = {}
    for trains in (False, True):
        base = masked().unload()
        model: Any = PeftModel.from_pretrained(base, folder, is_trainable=trains).eval()
        model = sharded(model) if dist.is_initialized() else model
        if trains:
            found["losses"] = torch.tensor(trained(model), dtype=torch.float64)
        with torch.no_grad():
            found[f"{trains}"] = torch.cat([model(batch(0, 1)[0]) for _ in range(2)])
        again = folder / f"again{trains}"
        save(model, again, is_main_process=not dist.is_initialized() or dist.get_rank() == 0)
    return found


def test_loaded_adapters_answer_and_train_alike(tmp_path):
    save(masked(init_weights=False), tmp_path / "adapter")
    one = load_and_answer(tmp_path / "adapter")
    files = {path: path.read_bytes() for path in (tmp_path / "adapter").glob("again*/adapter_model*")}
    for rank in run_processes(load_and_answer, 2, tmp_path, tmp_path / "adapter"):
        torch.testing.assert_close(rank, one, rtol=1e-9, atol=1e-9)
    assert len(files) == 2
    assert {path: path.read_bytes() for path in files} == files


def test_zero_3_is_refused_at_the_first_forward():
    model = masked()
    for parameter in model.parameters():
        parameter.ds_id = 0  # as deepspeed.initialize marks it
    with pytest.raises(ValueError, match=r"'1.first' is partitioned by DeepSpeed's ZeRO-3.*--fsdp_version 2"):
        model(batch(0, 1)[0])


def test_a_model_offloaded_after_its_adapter_was_added():
    model = cpu_offload(masked(), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"'1.first' is offloaded by accelerate.*merge_and_unload\(\) before"):
        model(batch(0, 1)[0])
    expected = masked().eval()(batch(0, 1)[0])
    merged = cpu_offload(masked().merge_and_unload(), execution_device=torch.device("cpu"))
    torch.testing.assert_close(merged.eval()(batch(0, 1)[0]), expected)
