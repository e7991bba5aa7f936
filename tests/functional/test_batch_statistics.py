# SPDX-License-Identifier: Apache-2.0
"""Statistics of the joined batch and the normalisation by them, against torch's own on the joined batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from smn_peft.functional.distributed import joined_batch_norm, joined_statistics, process_index
from tests.gloo import run_processes

SHAPES = {"1d": (12, 5), "sequence": (12, 5, 7), "2d": (12, 5, 4, 3)}


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, affine: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=dtype) * 3 + 20
    channels = shape[1]
    tensors = {"x": x, "gradient": torch.randn(shape, generator=generator, dtype=dtype)}
    tensors |= {"mean": torch.zeros(channels, dtype=dtype), "var": torch.ones(channels, dtype=dtype)}
    if affine:
        tensors["weight"] = torch.rand(channels, generator=generator, dtype=dtype)
        tensors["bias"] = torch.rand(channels, generator=generator, dtype=dtype)
    return tensors


def normalise(function, tensors: dict[str, Tensor], rows: slice = slice(None)) -> dict[str, Tensor]:
    """Output, gradients and running statistics of a normalisation of some rows of the batch."""
    mean, var = tensors["mean"].clone(), tensors["var"].clone()
    x = tensors["x"][rows].clone().requires_grad_()
    weight, bias = (tensors[name].clone().requires_grad_() if name in tensors else None for name in ("weight", "bias"))
    y = function(x, mean, var, weight, bias)
    y.backward(tensors["gradient"][rows])
    result = {"y": y.detach(), "dx": x.grad, "mean": mean, "var": var}
    return result if weight is None else result | {"dweight": weight.grad, "dbias": bias.grad}


def joined(x, mean, var, weight, bias):
    return joined_batch_norm(x, mean, var, weight, bias, momentum=0.3, eps=1e-5)


def torchs(x, mean, var, weight, bias):
    return F.batch_norm(x, mean, var, weight, bias, training=True, momentum=0.3, eps=1e-5)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_one_process_equals_torch(shape, affine):
    tensors = inputs(shape, affine=affine)
    torch.testing.assert_close(normalise(joined, tensors), normalise(torchs, tensors), rtol=1e-9, atol=1e-11)


def test_gradients_are_those_of_finite_differences():
    tensors = inputs((6, 3, 2))
    arguments = [tensors[name].clone().requires_grad_() for name in ("x", "weight", "bias")]
    assert torch.autograd.gradcheck(lambda x, w, b: joined_batch_norm(x, None, None, w, b, 0.1, 1e-3), arguments)


def test_statistics_are_exact_far_from_zero():
    x = inputs((4000, 2), torch.float32)["x"] + 1e4
    mean, var, count = joined_statistics(x)
    assert count == 4000
    torch.testing.assert_close(mean.double(), x.double().mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), x.double().var(0, correction=0), rtol=1e-4, atol=0)


def test_bf16_input_is_measured_in_fp32_and_stays_bf16():
    tensors = inputs((64, 5, 4, 4), torch.float32)
    tensors["x"], tensors["gradient"] = tensors["x"].bfloat16(), tensors["gradient"].bfloat16()
    found, expected = normalise(joined, tensors), normalise(torchs, tensors)
    assert found["y"].dtype == found["dx"].dtype == torch.bfloat16
    assert found["mean"].dtype == found["dweight"].dtype == torch.float32
    for name in ("mean", "var"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    for name in ("y", "dx", "dweight", "dbias"):
        torch.testing.assert_close(found[name], expected[name], rtol=2e-2, atol=2e-2)


def test_one_value_per_channel_is_refused():
    with pytest.raises(ValueError, match=r"one value per channel, got input \(1, 5\): enlarge the batch"):
        joined(torch.zeros(1, 5), None, None, None, None)


def on_one_rank() -> dict[str, Tensor]:
    """Results of this rank's unequal share, for every shape and dtype."""
    rows = slice(0, 5) if process_index() == 0 else slice(5, None)
    result = {}
    for dtype in (torch.float64, torch.float32):
        for name, shape in SHAPES.items():
            found = normalise(joined, inputs(shape, dtype), rows)
            result |= {f"{name} {dtype} {key}": value for key, value in found.items()}
    single = {key: t[:1] if t.ndim > 1 else t for key, t in inputs((12, 5)).items()}
    return result | {"one row each": normalise(joined, single)["y"]}


def test_two_processes_equal_one_on_the_joined_batch(tmp_path):
    ranks = run_processes(on_one_rank, 2, tmp_path)
    for dtype, tolerance in [(torch.float64, 1e-10), (torch.float32, 2e-5)]:
        for name, shape in SHAPES.items():
            for key, expected in normalise(torchs, inputs(shape, dtype)).items():
                parts = [rank[f"{name} {dtype} {key}"] for rank in ranks]
                if key in ("mean", "var"):
                    assert torch.equal(*parts)
                    found = parts[0]
                elif key in ("dweight", "dbias"):  # each process's own part
                    found = sum(parts)
                else:
                    found = torch.cat(parts)
                torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=f"{name} {key}")
    assert all(rank["one row each"].shape == (1, 5) for rank in ranks)
